"""The Ray Serve deployments: a model with its engine inside the replica, and the front door for plain Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Final, TypeVar

import psutil  # type: ignore[import-untyped]
import ray
import uvloop
from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp, Receive, Scope, Send

from quantserve.plan import RESERVE, Plan
from quantserve.serve.asgi import Guard, Refused
from quantserve.serve.cpus import leave_to_workers
from quantserve.serve.directory import POLL_S, Directory, follow, look_up
from quantserve.serve.engine_imports import ENGINE_CORE, collecting_rarely, dismiss_spares, hurry_children, start_spare
from quantserve.serve.limits import Policy
from quantserve.serve.listener import Listener
from quantserve.serve.remote import DRAINING
from quantserve.serve.request_defaults import RequestDefaults
from quantserve.serve.served import public_app

FRONT_DOOR: Final = "_front-door"
"""Name of the front door's deployment; model ids cannot begin with an underscore."""
WATCH_S: Final = 1.0
LAST_WORDS_S: Final = 2.0
HANGS: Final = 4
"""An engine that does not answer for so many health check timeouts hangs; a long prefill takes its time, too."""
MEET_S: Final = 5.0
"""How long a front door looks for replicas before it is ready without; at the first start there are none yet."""
POLICY: Final = "quantserve.serve.scaling:replicas_for_load"

T = TypeVar("T")
logger = logging.getLogger(__name__)


class ModelServer:
    """One replica of a model: vLLM's engine and its OpenAI app behind request defaults, on a port of its own.

    The front door talks to that port directly. Ray Serve starts, checks, scales and stops the replica and is not in
    the way of a single token.

    Args:
        plan: the plan as JSON.
        token: what a front door says when it connects; nobody else is answered.
        loopback: whether the port is for this machine only.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, plan: dict[str, Any], token: str, loopback: bool
    ) -> None:
        self._plan = Plan.model_validate(plan)
        self._door = Doorkeeper()
        self._listener = Listener(self._door, token)
        self._host = "127.0.0.1" if loopback else ray.util.get_node_ip_address()
        self._loop = _LoopThread()
        self._hung = False
        await self._loop.run(self._start())

    async def _start(self) -> None:
        start_spare(ENGINE_CORE)
        hurry_children()
        with collecting_rarely():
            from quantserve.serve import vllm_app

        self._engine = await vllm_app.start(self._plan)
        dismiss_spares()
        self._cpus = sorted(leave_to_workers(int(os.environ.get(RESERVE, 0))))
        length = self._engine.engine.model_config.max_model_len
        self._door.app = Guard(RequestDefaults(self._engine.app, self._plan.request_defaults, length))
        listener = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET)
        listener.bind((self._host, 0))
        self._port = int(listener.getsockname()[1])
        await self._listener.start(listener)
        self._watch = asyncio.create_task(self._exit_with_engine())

    async def describe(self) -> dict[str, Any]:
        """Where this replica listens and what it is doing; asked by the front door."""
        return {
            "id": serve.get_replica_context().replica_id.unique_id,
            "host": self._host,
            "port": self._port,
            "draining": self._door.draining,
            "ongoing": self._door.ongoing,
            "cpus": self._cpus,
        }

    async def check_health(self) -> None:
        """Called by Serve; raises when the engine is dead or hangs."""
        await self._loop.run(self._engine.check_health())
        if self._hung:
            raise RuntimeError("the engine does not answer")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: requests in progress, which it does not see, for `scaling.replicas_for_load`."""
        return {"ongoing": float(self._door.ongoing)}

    async def _exit_with_engine(self) -> None:
        """Leave when the engine has died or hangs: it cannot be revived in this process, and Serve replaces a dead
        replica at once but asks an unhealthy one three times.
        """
        patience = HANGS * float(self._plan.deployment.get("health_check_timeout_s") or 30)
        asked = asyncio.get_running_loop().time()
        question: asyncio.Task[None] | None = None
        while not self._engine.dead:
            await asyncio.sleep(WATCH_S)
            now = asyncio.get_running_loop().time()
            if question is None or question.done():
                if question is None or not question.exception():
                    question, asked = asyncio.create_task(self._engine.ping()), now
            elif now - asked > patience:
                self._hung = self._door.hung = True
                logger.error("the engine of %s did not answer for %.0f s", self._plan.model_id, patience)
                break
        logger.error("the engine of %s is lost; the replica exits to be replaced", self._plan.model_id)
        self._door.draining = True  # another replica may take what comes now
        await asyncio.sleep(LAST_WORDS_S)  # for the errors of requests in flight to reach their clients
        for process in psutil.Process().children(recursive=True):  # a process that hangs would outlive this one
            with contextlib.suppress(psutil.Error):
                process.kill()
        os._exit(1)

    async def __del__(self) -> None:
        """Called by Serve when it stops the replica: what has begun is finished, what comes goes elsewhere."""
        if hasattr(self, "_watch"):
            await self._loop.run(self._stop())

    async def _stop(self) -> None:
        self._watch.cancel()
        given = self._plan.deployment.get("graceful_shutdown_timeout_s")
        patience = max(0.5, (20.0 if given is None else float(given)) - 1.0)
        await self._door.drain(patience)
        self._listener.close()
        self._engine.shutdown()


class Doorkeeper:
    """The outermost layer of a replica: how many are asking, and whether new ones are taken."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None
        self.ongoing = 0
        self.draining = False
        self.hung = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in."""
        assert self.app is not None
        if self.hung and scope["path"] == "/health":
            await Refused(503, "the engine does not answer").response(scope, receive, send)
        elif self.draining:
            headers = {DRAINING.decode(): "1"}
            await Refused(503, "this replica is being stopped", headers=headers).response(scope, receive, send)
        else:
            counted = scope["method"] == "POST"
            self.ongoing += counted
            try:
                await self.app(scope, receive, send)
            finally:
                self.ongoing -= counted

    async def drain(self, patience: float) -> None:
        """Take no more requests; return when those in progress are finished, or after `patience` seconds."""
        self.draining = True
        deadline = asyncio.get_running_loop().time() + patience
        while self.ongoing and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)


class _LoopThread:
    """uvloop in a thread: Serve runs user code on asyncio's own loop, which is slower per token."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        threading.Thread(target=self._run, daemon=True, name="quantserve").start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))


class FrontDoorServer:
    """The front door as a deployment, for `serve run`, `serve deploy` and KubeRay.

    Args:
        models: as from `served.describe_models`, each with a handle of its deployment.
        token: see `ModelServer`.
        policy: limits, keys and logging, as JSON.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, models: Sequence[Mapping[str, Any]], token: str, policy: Mapping[str, Any]
    ) -> None:
        settings = Policy.model_validate(policy)
        self._directory = Directory(models, token)
        self._app = public_app(models, self._directory, settings)
        handles = {str(model["card"]["id"]): model["handle"] for model in models}
        await self._meet(handles)
        self._following = asyncio.get_running_loop().create_task(follow(self._directory, handles))

    async def _meet(self, handles: Mapping[str, Any]) -> None:
        """Find the replicas there are: once it is ready this front door may take over from another one."""
        deadline = asyncio.get_running_loop().time() + MEET_S
        while asyncio.get_running_loop().time() < deadline:
            self._directory.update(await look_up(handles))
            if all(pool.replicas for pool in self._directory.pools.values()):
                return
            await asyncio.sleep(POLL_S)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The app Serve sends requests to."""
        return self._app


def model_application(plan: Plan, token: str, *, loopback: bool) -> Application:
    """The Ray Serve application of one model, for a front door to reach."""
    options = dict(plan.deployment)
    actor = dict(options.pop("ray_actor_options", None) or {})
    actor["runtime_env"] = plan.runtime_env
    if not (actor.get("num_gpus") or options.get("placement_group_bundles")):
        # Without GPUs there is room for the new replica beside the old one, which serves until the new one is ready.
        options.setdefault("max_surge_percent", 100)
    if scaling := options.get("autoscaling_config"):
        options["autoscaling_config"] = {**scaling, "policy": {"policy_function": POLICY}}
    deployment = serve.deployment(ModelServer).options(name=plan.app_name, ray_actor_options=actor, **options)
    return deployment.bind(plan.model_dump(mode="json"), token, loopback)


def front_door_application(
    models: Sequence[Mapping[str, Any]], children: Mapping[str, Application], token: str, policy: Mapping[str, Any]
) -> Application:
    """The front door and all models as one application."""
    bound = [{**model, "handle": children[str(model["card"]["id"])]} for model in models]
    deployment = serve.deployment(serve.ingress()(FrontDoorServer)).options(
        name=FRONT_DOOR,
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=100_000,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=float(policy["request_timeout_s"]),
        max_surge_percent=100,
    )
    return deployment.bind(bound, token, dict(policy))
