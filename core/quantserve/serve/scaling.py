"""Autoscaling policy for Ray Serve's controller, which imports this file and no other of quantserve."""

from __future__ import annotations

import math
from typing import Any


def replicas_for_load(ctx: Any) -> tuple[int, dict[str, Any]]:
    """Replicas needed for ``target_ongoing_requests`` requests each, from the requests that the replicas report.

    Serve applies its delays and bounds to the result. Its own request count has only the requests that scale a model up
    from zero, because all others bypass Serve.
    """
    reported = (ctx.aggregated_metrics or {}).get("ongoing") or {}
    requests = sum(reported.values()) + ctx.total_num_requests
    return math.ceil(requests / ctx.config.target_ongoing_requests), ctx.policy_state
