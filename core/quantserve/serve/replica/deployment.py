"""A replica of a model as a Ray Serve deployment: the engine behind the protocol of the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

import psutil  # type: ignore[import-untyped]
import ray
import uvloop
from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp, Receive, Scope, Send

from quantserve.checkpoint.downloads import fetch
from quantserve.planning.plan import Plan
from quantserve.serve.asgi import Guard, Refused
from quantserve.serve.cpus import leave_to_workers
from quantserve.serve.headers import DRAINING_HEADER
from quantserve.serve.replica.autoscaling import QueueReports
from quantserve.serve.replica.request_defaults import RequestDefaults
from quantserve.serve.replica.vllm import patches
from quantserve.serve.replica.vllm.spawned_imports import collecting_rarely, dismiss_spares
from quantserve.serve.replica.watchdog import watch
from quantserve.serve.signals import shield
from quantserve.serve.transport.server import Listener
from quantserve.system.environment import API_KEY, API_KEYS, GATEWAY_LIMITS, RESERVE, UNLIMITED
from quantserve.system.homes import settle

LOOPBACK: Final = "127.0.0.1"
LAST_WORDS_S: Final = 2.0
HANGS: Final = 4
"""Hang timeout of an engine, in health check timeouts; long, because an engine does not answer during a prefill."""
POLICY: Final = "quantserve.serve.replica.autoscaling:replicas_for_load"

T = TypeVar("T")
logger = logging.getLogger(__name__)


class ModelServer:
    """One replica of a model: vLLM's engine and its OpenAI app behind request defaults, on its own port.

    The gateway connects to that port directly. Ray Serve starts, checks, scales and stops the replica; requests and
    tokens bypass it.

    Args:
        plan: the plan as JSON.
        token: authenticates gateways; other connections are closed.
        loopback: whether to listen on 127.0.0.1 only.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, plan: dict[str, Any], token: str, loopback: bool
    ) -> None:
        self._plan = Plan.model_validate(plan)
        self._gate = RequestGate()
        self._listener = Listener(self._gate, token)
        self._host = LOOPBACK if loopback else ray.util.get_node_ip_address()
        self._queued = QueueReports()
        self._loop = _LoopThread()
        self._hung = False
        await self._loop.run(self._start())

    async def _start(self) -> None:
        if self._host == LOOPBACK:  # `quantserve serve` stops it; in a cluster, Ray does
            shield()
        for note in settle(os.environ):  # of this node, and of the model's runtime_env
            logger.warning(note)
        for name in (API_KEY, API_KEYS):  # the gateway checks keys, and sends none
            os.environ.pop(name, None)
        for name in GATEWAY_LIMITS:  # vLLM's own are lower: 4 stops, without those of the model's config
            os.environ.setdefault(name, str(UNLIMITED))
        # vLLM's server imports model_hosting_container_standards, which silences the warnings of all other packages.
        logging.getLogger("quantserve").setLevel(logging.WARNING)
        for files in self._plan.downloads:  # in a cluster this node may not have them
            await asyncio.to_thread(fetch, files, logger.warning)
        patches.apply("spawned-imports")
        patches.apply("spare-process")
        with collecting_rarely():
            from quantserve.serve.replica.vllm import server as vllm_app

        self._engine = await vllm_app.start(self._plan)
        dismiss_spares()
        self._cpus = sorted(leave_to_workers(int(os.environ.get(RESERVE, 0))))
        length = self._engine.engine.model_config.max_model_len
        self._gate.app = Guard(RequestDefaults(self._engine.app, self._plan.request_defaults, length))
        listener = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET)
        listener.bind((self._host, 0))
        self._port = int(listener.getsockname()[1])
        await self._listener.start(listener)
        self._watch = asyncio.create_task(self._exit_with_engine())

    async def describe(self, gateway: str = "", waiting: int = 0) -> dict[str, Any]:
        """Address and state of this replica, for discovery.

        Args:
            gateway: id of the asking gateway.
            waiting: number of requests in its queue for this model, for autoscaling.
        """
        if gateway:
            self._queued.add(gateway, waiting)
        return {
            "id": serve.get_replica_context().replica_id.unique_id,
            "actor": ray.get_runtime_context().get_actor_id(),
            "host": self._host,
            "port": self._port,
            "draining": self._gate.draining,
            "cpus": self._cpus,
        }

    async def check_health(self) -> None:
        """Called by Serve; raises when the engine is dead or hangs, or when nothing watches it any more."""
        await self._loop.run(self._engine.check_health())
        if self._hung or self._watch.done():
            raise RuntimeError("the engine does not respond" if self._hung else "the hang watchdog has ended")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve: requests in progress and queued, which bypass Serve, for `scaling.replicas_for_load`."""
        return {"ongoing": float(self._gate.ongoing), "queued": float(self._queued.total)}

    async def _exit_with_engine(self) -> None:
        """Exit the replica when its engine has died or hangs. The engine cannot be restarted in this process, and Serve
        replaces a dead replica at once, an unhealthy one only after three failed health checks.
        """
        timeout = HANGS * float(self._plan.deployment.get("health_check_timeout_s") or 30)
        if await watch(self._engine.ping, lambda: self._engine.dead, timeout):
            self._hung = self._gate.hung = True
            logger.error("the engine of %s did not respond for %.0f s", self._plan.model_id, timeout)
        logger.error("the engine of %s failed; the replica exits and Ray Serve replaces it", self._plan.model_id)
        self._gate.draining = True  # the gateway sends new requests to another replica
        await asyncio.sleep(LAST_WORDS_S)  # lets the errors of running requests reach their clients
        for process in psutil.Process().children(recursive=True):  # a hanging process would outlive this one
            with contextlib.suppress(psutil.Error):
                process.kill()
        os._exit(1)

    async def __del__(self) -> None:
        """Called by Serve when it stops the replica: drain, then stop the engine."""
        if hasattr(self, "_watch"):
            await self._loop.run(self._stop())

    async def _stop(self) -> None:
        self._watch.cancel()
        given = self._plan.deployment.get("graceful_shutdown_timeout_s")
        patience = max(0.5, (20.0 if given is None else float(given)) - 1.0)
        await self._gate.drain(patience)
        self._listener.close()
        self._engine.shutdown()


class RequestGate:
    """The outermost layer of a replica: counts requests, and refuses new ones while draining."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None
        self.ongoing = 0
        self.draining = False
        self.hung = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the app, or refuse it."""
        assert self.app is not None
        if self.hung and scope["path"] == "/health":
            await Refused(503, "The engine does not respond.").response(scope, receive, send)
        elif self.draining:
            headers = {DRAINING_HEADER.decode(): "1"}
            await Refused(503, "This replica is shutting down.", headers=headers).response(scope, receive, send)
        else:
            counted = scope["method"] == "POST"
            self.ongoing += counted
            try:
                await self.app(scope, receive, send)
            finally:
                self.ongoing -= counted

    async def drain(self, patience: float) -> None:
        """Refuse new requests; return when those in progress are complete, or after `patience` seconds."""
        self.draining = True
        deadline = asyncio.get_running_loop().time() + patience
        while self.ongoing and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)


class _LoopThread:
    """uvloop in a thread: Serve runs user code on asyncio's default loop, which is slower per token."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        threading.Thread(target=self._run, daemon=True, name="quantserve").start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))


def model_application(plan: Plan, token: str, *, loopback: bool) -> Application:
    """The Ray Serve application of one model, which a gateway connects to."""
    options = dict(plan.deployment)
    actor = dict(options.pop("ray_actor_options", None) or {})
    actor["runtime_env"] = plan.runtime_env
    if not (actor.get("num_gpus") or options.get("placement_group_bundles")):
        # Without GPUs a new replica fits beside the old one, which serves until the new one is ready.
        options.setdefault("max_surge_percent", 100)
    if scaling := options.get("autoscaling_config"):
        options["autoscaling_config"] = {**scaling, "policy": {"policy_function": POLICY}}
    deployment = serve.deployment(ModelServer).options(name=plan.app_name, ray_actor_options=actor, **options)
    return deployment.bind(plan.model_dump(mode="json"), token, loopback)
