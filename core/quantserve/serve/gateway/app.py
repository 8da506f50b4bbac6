"""Turns plans into the gateway's model descriptions (JSON), and these into the gateway's app."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp

from quantserve.errors import ConfigError
from quantserve.serve.gateway.metrics.collect import GatewayMetrics, MetricsEndpoint
from quantserve.serve.gateway.middleware.limits import Policy, layers
from quantserve.serve.gateway.page import Page, make_page, page_settings
from quantserve.serve.gateway.routing.router import RESERVED, Router, ServedModel, model_aliases, model_card
from quantserve.serve.gateway.routing.status import Status, details
from quantserve.serve.gateway.upstreams.directory import Directory
from quantserve.serve.gateway.upstreams.pool import Limits
from quantserve.serve.gateway.upstreams.proxy import RemoteModel
from quantserve.serve.transport.client import Timing

if TYPE_CHECKING:
    from quantserve.planning.plan import Plan

DEFAULT_ONGOING = 256


def describe_models(plans: Sequence[Plan], created: int, policy: Policy) -> list[dict[str, Any]]:
    """The models as the gateway needs them, as JSON: card, route, aliases, limits and details for ``/status``.

    Args:
        created: Unix time for ``/v1/models``.
    """
    return [
        {
            "card": model_card(plan, created),
            "route": plan.route_prefix,
            "aliases": model_aliases(plan),
            "limits": asdict(limits_of(plan, policy)),
            "details": details(plan, model_aliases(plan)),
        }
        for plan in plans
    ]


def check_routes(plans: Sequence[Plan]) -> None:
    """Refuse a model whose route would hide a path of the API.

    Raises:
        ConfigError: its id is reserved.
    """
    for plan in plans:
        if plan.app_name.lower() in RESERVED:
            raise ConfigError(
                f"model id {plan.model_id!r} is reserved: its route {plan.route_prefix} would hide a path of the API\n"
                f"  fix: choose another model_id (reserved: {', '.join(sorted(RESERVED))})"
            )


def limits_of(plan: Plan, policy: Policy) -> Limits:
    """Admission limits of one model, from its deployment options."""
    options = plan.deployment
    ongoing = int(options.get("max_ongoing_requests") or DEFAULT_ONGOING)
    queued = options.get("max_queued_requests")
    scaling = options.get("autoscaling_config") or {}
    backpressure = options.get("backpressure_config") or {}
    return Limits(
        ongoing=ongoing,
        queued=ongoing if queued is None else int(queued),
        queue_s=policy.queue_timeout_s,
        wakes=scaling.get("min_replicas") == 0,
        affinity=plan.affinity,
        busy_status=int(backpressure.get("status_code") or 429),
        retry_after_s=backpressure.get("retry_after_s"),
    )


def timing_of(policy: Policy) -> Timing:
    """Timeouts and buffers of the connections to replicas."""
    return Timing(policy.connect_timeout_s, policy.replica_timeout_s, policy.client_buffer_kb << 10)


def public_app(
    models: Sequence[Mapping[str, Any]],
    directory: Directory,
    policy: Policy,
    page: Page | None = None,
) -> ASGIApp:
    """The app at the public address: limits, keys, logs and metrics around the router to the models' pools."""
    metrics = GatewayMetrics([model["card"] for model in models], lambda: directory.pools.values())
    served = []
    for model in models:
        pool = directory.pools[str(model["card"]["id"])]
        app = RemoteModel(pool, policy.request_timeout_s, policy.max_attempts)
        served.append(ServedModel(model["card"], app, pool.healthy, model["route"], model["aliases"]))
    endpoint = MetricsEndpoint(metrics)
    status = Status(models, directory.pools.values, endpoint)
    router = Router(served, endpoint, policy.health_cache_s, status, page, endpoint.sample)
    return layers(router, policy, [metrics], page.public if page else None)


def installed_page(
    explorer: Mapping[str, Any] | None, policy: Policy, models: Sequence[Mapping[str, Any]]
) -> Page | None:
    """The page at ``/``; None where there is none or none is wanted.

    Args:
        explorer: the section of the config, as JSON; None without a page.
    """
    if explorer is None or not explorer.get("enabled"):
        return None
    return make_page(page_settings(explorer, policy, models))
