"""The Ray Serve deployments: a model with its engine inside the replica, and the front door."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

from ray import serve
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from quantserve.plan import Plan
from quantserve.serve.asgi import Guard, Refused
from quantserve.serve.front_door import FrontDoor, ServedModel, model_aliases, model_card
from quantserve.serve.keys import ApiKeys
from quantserve.serve.relay import Head, RemoteModel, Request, answer
from quantserve.serve.request_defaults import RequestDefaults

FRONT_DOOR: Final = "_front-door"
"""Name of the front door's application; model ids cannot begin with an underscore."""
WATCH_S: Final = 1.0
LAST_WORDS_S: Final = 2.0

logger = logging.getLogger(__name__)


class ModelServer:
    """One replica of a model: vLLM's engine and its OpenAI server behind keys, checks and request defaults.

    Args:
        plan: the plan as JSON.
        card: entry in ``/v1/models``.
        keys: digests of the API keys.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, plan: dict[str, Any], card: dict[str, Any], keys: Sequence[str]
    ) -> None:
        from quantserve.serve import vllm_app

        self._plan = Plan.model_validate(plan)
        self._engine = await vllm_app.start(self._plan)
        self._app = RequestDefaults(self._engine.app, self._plan.request_defaults)
        self._card = card
        self._keys = keys
        self._watch = asyncio.create_task(self._exit_with_engine())

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The app for requests that come straight to this model, called by Serve once the engine runs."""
        model = ServedModel(self._card, self._app, self._plan.route_prefix, model_aliases(self._plan))
        return Guard(ApiKeys(FrontDoor([model]), self._keys))

    async def relay(self, request: Request) -> AsyncIterator[Head | bytes]:
        """Answer a request that the front door has checked and routed."""
        async for part in answer(Guard(self._app), request):
            yield part

    async def check_health(self) -> None:
        """Called by Serve; raises when the engine is dead."""
        await self._engine.check_health()

    async def _exit_with_engine(self) -> None:
        """Leave when the engine has died: it cannot be revived in this process, and Serve replaces a dead replica
        at once but asks an unhealthy one three times.
        """
        while not self._engine.dead:
            await asyncio.sleep(WATCH_S)
        logger.error("the engine of %s has died; the replica exits to be replaced", self._plan.model_id)
        await asyncio.sleep(LAST_WORDS_S)  # for the errors of requests in flight to reach their clients
        os._exit(1)

    def __del__(self) -> None:
        """Called by Serve when it stops the replica."""
        if watch := getattr(self, "_watch", None):
            watch.cancel()
        if engine := getattr(self, "_engine", None):
            engine.shutdown()


class FrontDoorServer:
    """The front door as a deployment.

    Args:
        models: for each model its card, its route, its aliases, and its application or a handle.
        keys: digests of the API keys.
    """

    def __init__(self, models: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
        served = [
            ServedModel(model["card"], _remote(model), model["route"], model["aliases"])  # one line per model
            for model in models
        ]
        self._app = Guard(ApiKeys(FrontDoor(served), keys))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The app Serve sends requests to."""
        return self._app


class LazyRemote:
    """A model in an application of its own, looked up when it is first asked: it may still be starting."""

    def __init__(self, model_id: str, application: str) -> None:
        self._model_id = model_id
        self._application = application
        self._remote: RemoteModel | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Forward one request."""
        if self._remote is None:
            try:
                handle: DeploymentHandle[Any] = await asyncio.to_thread(serve.get_app_handle, self._application)
            except RayServeException:
                message = f"the model `{self._model_id}` is not deployed"
                raise Refused(503, message, code="model_unavailable", headers={"retry-after": "5"}) from None
            self._remote = RemoteModel(self._model_id, handle)
        await self._remote(scope, receive, send)


def _remote(model: Mapping[str, Any]) -> ASGIApp:
    model_id = str(model["card"]["id"])
    handle = model.get("handle")
    return RemoteModel(model_id, handle) if handle is not None else LazyRemote(model_id, model["application"])


def model_application(plan: Plan, created: int, keys: Sequence[str], *, ingress: bool = True) -> Application:
    """The Ray Serve application of one model; without `ingress` only a front door reaches it."""
    options = dict(plan.deployment)
    actor = dict(options.pop("ray_actor_options", None) or {})
    actor["runtime_env"] = plan.runtime_env
    cls = serve.ingress()(ModelServer) if ingress else ModelServer
    deployment = serve.deployment(cls).options(name=plan.app_name, ray_actor_options=actor, **options)
    return deployment.bind(plan.model_dump(mode="json"), model_card(plan, created), list(keys))


def front_door_application(
    plans: Sequence[Plan], created: int, keys: Sequence[str], children: Mapping[str, Application] | None = None
) -> Application:
    """The application of the front door.

    Args:
        plans: the models it leads to.
        created: Unix time for ``/v1/models``.
        keys: digests of the API keys.
        children: the models' applications by model id, to be deployed as parts of this one; None when each is an
            application of its own.
    """
    models: list[dict[str, Any]] = []
    for plan in plans:
        model = {"card": model_card(plan, created), "route": plan.route_prefix, "aliases": model_aliases(plan)}
        if children is None:
            model["application"] = plan.app_name
        else:
            model["handle"] = children[plan.model_id]
        models.append(model)
    cls = serve.ingress()(FrontDoorServer)
    options = {"num_cpus": 0.1}
    deployment = serve.deployment(cls).options(
        name=FRONT_DOOR, ray_actor_options=options, max_ongoing_requests=100_000, health_check_timeout_s=30
    )
    return deployment.bind(models, list(keys))
