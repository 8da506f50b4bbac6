"""The gateway as a Ray Serve deployment, for `serve run`, `serve deploy` and KubeRay."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from quantserve.serve.gateway.app import installed_page, public_app, timing_of
from quantserve.serve.gateway.middleware.api_keys import forget_variable
from quantserve.serve.gateway.middleware.limits import Policy
from quantserve.serve.gateway.upstreams.directory import Directory
from quantserve.serve.gateway.upstreams.discovery import POLL_S, poll_replicas

GATEWAY: Final = "_gateway"
"""Name of the gateway's deployment; model ids cannot begin with an underscore."""
STARTUP_POLL_S: Final = 0.1
DISCOVERY_S: Final = 5.0
"""How long a new gateway waits for replicas before it is ready without them; at the first start there are none."""


class GatewayServer:
    """The gateway as a deployment.

    Args:
        models: as from `served.describe_models`, each with a handle of its deployment.
        token: authenticates it to replicas.
        policy: limits, keys and logging, as JSON.
        explorer: config of the page at ``/``, as JSON; None without a page.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        models: Sequence[Mapping[str, Any]],
        token: str,
        policy: Mapping[str, Any],
        explorer: Mapping[str, Any] | None = None,
    ) -> None:
        forget_variable()
        settings = Policy.model_validate(policy)
        self._directory = Directory(models, token, timing_of(settings))
        page = installed_page(explorer, settings, models)
        self._app = public_app(models, self._directory, settings, page)
        handles = {str(model["card"]["id"]): model["handle"] for model in models}
        self._polling = asyncio.get_running_loop().create_task(poll_replicas(self._directory, handles, POLL_S))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCOVERY_S):  # once this gateway is ready, it may replace another one
                while not all(pool.replicas for pool in self._directory.pools.values()):
                    await asyncio.sleep(STARTUP_POLL_S)

    def check_health(self) -> None:
        """Called by Serve; raises when the discovery of replicas has ended."""
        if self._polling.done():
            raise RuntimeError("the discovery of replicas has ended")

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The ASGI app for Serve's proxy."""
        return self._app


def gateway_application(
    models: Sequence[Mapping[str, Any]],
    children: Mapping[str, Application],
    token: str,
    policy: Mapping[str, Any],
    explorer: Mapping[str, Any] | None = None,
) -> Application:
    """The gateway and all models as one application."""
    bound = [{**model, "handle": children[str(model["card"]["id"])]} for model in models]
    deployment = serve.deployment(serve.ingress()(GatewayServer)).options(
        name=GATEWAY,
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=100_000,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=float(policy["request_timeout_s"]),
        max_surge_percent=100,
    )
    return deployment.bind(bound, token, dict(policy), explorer and dict(explorer))
