"""Autoscaling policy for Ray Serve's controller, which imports this file and no other of quantserve."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

LEASE_S: Final = 15.0
"""How long a gateway's report of its queue counts; it reports with each discovery poll, every 5 s at least."""


class QueueReports:
    """Requests in the queues of all gateways, as they report them to a replica."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._reports: dict[str, tuple[int, float]] = {}

    def add(self, gateway: str, waiting: int) -> None:
        """Note the length of a gateway's queue; it replaces that gateway's earlier one."""
        self._reports[gateway] = waiting, self._clock()
        self._reports = {name: one for name, one in self._reports.items() if self._clock() - one[1] < LEASE_S}

    @property
    def total(self) -> int:
        """Queued requests in the gateways that reported within `LEASE_S`."""
        return sum(waiting for waiting, when in self._reports.values() if self._clock() - when < LEASE_S)


def replicas_for_load(ctx: Any) -> tuple[int, dict[str, Any]]:
    """Replicas needed for ``target_ongoing_requests`` requests each, from the requests that the replicas report.

    Serve applies its delays and bounds to the result. Its own request count has only the requests that scale a model up
    from zero, because all others bypass Serve. Each replica reports its own requests in progress, and the same queues.
    """
    metrics = ctx.aggregated_metrics or {}
    ongoing = sum((metrics.get("ongoing") or {}).values())
    queued = max((metrics.get("queued") or {}).values(), default=0)
    requests = ongoing + queued + ctx.total_num_requests
    return math.ceil(requests / ctx.config.target_ongoing_requests), ctx.policy_state
