"""How many replicas a model needs, for Ray Serve's controller, which imports this file and nothing else of ours."""

from __future__ import annotations

import math
from typing import Any


def replicas_for_load(ctx: Any) -> tuple[int, dict[str, Any]]:
    """``target_ongoing_requests`` per replica, of the requests that the replicas report.

    Serve adds its delays and bounds to the answer. Requests go to the replicas directly, so its own count knows only
    those that wake a model which was scaled to zero.
    """
    reported = (ctx.aggregated_metrics or {}).get("ongoing") or {}
    requests = sum(reported.values()) + ctx.total_num_requests
    return math.ceil(requests / ctx.config.target_ongoing_requests), ctx.policy_state
