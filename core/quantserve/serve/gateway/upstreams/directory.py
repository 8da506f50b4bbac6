"""The replica pools of all models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantserve.serve.gateway.upstreams.pool import Limits, Pool
from quantserve.serve.transport.client import Timing


class Directory:
    """The replica pools of all models.

    Args:
        models: each with its ``card`` and ``limits``.
        token: authenticates connections to replicas.
        timing: timeouts and buffers of these connections.
    """

    def __init__(self, models: Sequence[Mapping[str, Any]], token: str, timing: Timing | None = None) -> None:
        self.pools = {
            str(model["card"]["id"]): Pool(
                str(model["card"]["id"]), Limits(**model["limits"]), token, timing or Timing()
            )
            for model in models
        }

    def update(self, addresses: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Set the replicas of each model in `addresses`; other models keep theirs."""
        for model_id, replicas in addresses.items():
            if (pool := self.pools.get(model_id)) is not None:
                pool.update(replicas)

    @property
    def wanted(self) -> list[str]:
        """Models with queued requests and no replica."""
        return [model_id for model_id, pool in self.pools.items() if pool.wanted]

    @property
    def reachable(self) -> list[str]:
        """Models whose requests are accepted: they have a replica, or scale from zero on demand."""
        return [model_id for model_id, pool in self.pools.items() if pool.reachable]

    @property
    def settled(self) -> bool:
        """Whether every pool is settled; see `Pool.settled`."""
        return all(pool.settled for pool in self.pools.values())

    @property
    def waiting(self) -> dict[str, int]:
        """Number of queued requests by model id, without models that have none."""
        return {model_id: len(pool.waiting) for model_id, pool in self.pools.items() if pool.waiting}

    @property
    def status(self) -> dict[str, Any]:
        """What `poll_replicas` needs to know, as JSON."""
        return {name: getattr(self, name) for name in ("wanted", "reachable", "settled", "waiting")}

    def fail_running(self) -> None:
        """End all requests in progress or queued with an error: shortly before the drain timeout of a shutdown ends,
        so that streams end with an error event instead of a closed connection.
        """
        for pool in self.pools.values():
            pool.fail_running()
