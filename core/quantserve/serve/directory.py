"""Service discovery: polls Ray Serve for the replicas of every model."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from quantserve.serve.replicas import Limits, Pool
from quantserve.serve.upstream import Timing

POLL_S: Final = 1.0
"""Poll interval while replicas come and go. A rolling update stops an old replica 2 s after the new one is ready,
and the new one must be discovered before that.
"""
HURRY_S: Final = 0.2
"""Poll interval while a model that should have a replica has none."""
ANSWER_S: Final = 5.0

logger = logging.getLogger(__name__)


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


class ReplicaSink(Protocol):
    """What `poll_replicas` updates: a `Directory`, or the gateway process that holds one."""

    def update(self, addresses: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Set the replicas of each model in `addresses`."""

    @property
    def wanted(self) -> list[str]:
        """Models with queued requests and no replica."""

    @property
    def reachable(self) -> list[str]:
        """Models whose requests are accepted."""

    @property
    def settled(self) -> bool:
        """Whether all replicas are healthy and no request is queued."""

    @property
    def waiting(self) -> Mapping[str, int]:
        """Number of queued requests by model id."""


async def poll_replicas(sink: ReplicaSink, handles: Mapping[str, Any], calm_s: float = POLL_S) -> None:
    """Poll Ray Serve for replicas and update the sink, without end.

    Args:
        sink: gets the replicas.
        handles: Ray Serve handles of the deployments, by model id.
        calm_s: poll interval in seconds while all replicas are healthy and no request is queued.
    """
    waking: dict[str, asyncio.Future[Any]] = {}
    polled = -math.inf
    while True:
        hurry = sink.wanted or len(sink.reachable) < len(handles)
        interval = HURRY_S if hurry else calm_s if sink.settled else POLL_S
        if time.monotonic() - polled >= interval:
            sink.update(await look_up(handles))
            polled = time.monotonic()
        for model_id in sink.wanted:
            wake(model_id, handles, waking)
        await asyncio.sleep(HURRY_S)


async def look_up(handles: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The replicas by model id, without models whose replicas could not be queried."""
    found = await asyncio.gather(*(replicas_of(handle) for handle in handles.values()))
    return {name: there for name, there in zip(handles, found, strict=True) if there is not None}


async def replicas_of(handle: Any) -> list[dict[str, Any]] | None:
    """Addresses of a deployment's running replicas; None when they are unknown at the moment."""
    from ray.serve.exceptions import DeploymentUnavailableError

    try:
        answers = await asyncio.to_thread(
            lambda: handle.broadcast("describe").results(timeout_s=ANSWER_S, return_exceptions=True)
        )
    except DeploymentUnavailableError:  # it has no replica
        return []
    except Exception as error:
        logger.debug("discovery: querying the replicas failed: %s", type(error).__name__)
        return None
    return [answer for answer in answers if isinstance(answer, dict)]


def wake(model_id: str, handles: Mapping[str, Any], waking: dict[str, asyncio.Future[Any]]) -> None:
    """Make Serve start a replica of a model scaled to zero, by one pending request per model."""
    if (pending := waking.get(model_id)) is None or pending.done():
        waking[model_id] = asyncio.ensure_future(_ask(handles[model_id]))


async def _ask(handle: Any) -> None:
    try:
        await handle.describe.remote()
    except Exception as error:
        logger.warning("scaling up from zero failed: %s", type(error).__name__)
