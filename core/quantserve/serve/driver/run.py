"""`quantserve serve`: runs plans as Ray Serve applications on this machine until it gets a signal to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from quantserve.checkpoint.downloads import fetch
from quantserve.config import ExplorerConfig, HttpConfig
from quantserve.errors import EngineError, one_line
from quantserve.planning.plan import Plan
from quantserve.serve.cpus import keep_off
from quantserve.serve.driver.announce import announce, say
from quantserve.serve.driver.detach import Detached
from quantserve.serve.driver.gateway_process import GatewayProcess
from quantserve.serve.driver.processes import Processes
from quantserve.serve.driver.progress import Progress
from quantserve.serve.driver.ray_cluster import cluster_secret, listen, log_folder, start_ray, stop_ray
from quantserve.serve.gateway.app import check_routes, describe_models
from quantserve.serve.gateway.middleware.api_keys import forget_variable
from quantserve.serve.gateway.middleware.limits import Policy
from quantserve.serve.gateway.upstreams.discovery import poll_replicas
from quantserve.serve.replica.vllm import patches
from quantserve.serve.signals import Stopped, StopSignal
from quantserve.system.addresses import base_url, is_loopback
from quantserve.system.environment import API_KEYS
from quantserve.system.servers import Record

POLL_S: Final = 0.5
WATCH_S: Final = 5.0
REACHABLE_S: Final = 15.0
"""Longest wait until the gateway knows all replicas; a model lost in between does not delay the others."""
KILL_GATEWAY_S: Final = 3.0
"""A gateway is killed so long after the drain timeout."""
DISCOVERY_WAIT_S: Final = 1.0
DISCOVERY_END_S: Final = 2.0
STOPPED_AT_ONCE: Final = 130
"""Exit code after a second signal."""


def serve_plans(
    plans: Sequence[Plan],
    http: HttpConfig,
    *,
    keep_going: bool = False,
    sources: Sequence[str] = (),
    detached: Detached | None = None,
    explorer: ExplorerConfig | None = None,
) -> int:
    """Serve the planned models behind one address until SIGINT, SIGTERM or SIGHUP; returns the exit code.

    Each model is a Ray Serve application. The gateway at the address routes to all of them: at ``/v1`` by the ``model``
    field of a request, at ``/MODEL_ID/v1`` by path.

    Args:
        plans: at least one; ids differ.
        http: address, API keys and limits.
        keep_going: return 0 although some models failed to start; otherwise 4 then.
        sources: configs and models as on the command line, for `quantserve status`.
        detached: the process that waits for this one; None in the foreground.
        explorer: config of the page at ``/``; None without a page.

    Raises:
        CheckpointError: files of a bucket, or an adapter, cannot be downloaded.
        EngineError: the port is in use, Ray or all models failed to start, or Ray died.
        UsageError: the host, the port, the API keys file or ``QUANTSERVE_PATCHES`` cannot be used.
    """
    check_routes(plans)
    for plan in plans:
        for files in plan.downloads:
            fetch(files, say)
    for plan in plans:
        for risk in patches.risks({**os.environ, **plan.runtime_env["env_vars"]}):
            say(f"Warning: {plan.model_id}: {risk}")
    policy = Policy.of(http)
    forget_variable()
    listener = listen(http.host, http.port)
    port = int(listener.getsockname()[1])
    if not policy.has_keys and not is_loopback(http.host):
        say(
            f"Warning: listening on {http.host} without API keys: anyone who can reach this machine can use the API. "
            f"Set {API_KEYS} or --api-keys-file."
        )
    record = Record(
        os.environ,
        url=base_url(http.host, port),
        keys=policy.has_keys,
        drain_s=policy.drain_timeout_s,
        sources=tuple(sources),
        models=tuple(plan.model_id for plan in plans),
        log=detached.log if detached else "",
    )
    server = _Server(plans, policy, listener, record, explorer)
    stop = StopSignal(server.end)
    try:
        say(f"Starting Ray and {_count(plans)}; small models take 30 to 90 s, large ones several minutes.")
        server.start(stop)
        ready = server.ready
        how_to_stop = {"stop": detached.stop_line} if detached else {}
        announce(ready, len(plans), http.host, port, policy.has_keys, page=server.page, **how_to_stop)
        if server.failed:
            say(f"Not served, because they failed to start (reasons above): {', '.join(server.failed)}")
        record.update(state="ready", failed=tuple(server.failed))
        if detached:
            detached.ready(keep_going or not server.failed)
        server.watch(stop)
    except Stopped:
        pass
    finally:
        record.update(state="stopping")
        server.stop()
        record.remove()
    return EngineError.exit_code if server.failed and not keep_going else 0


class _Server:
    """Ray, the models and the gateway."""

    def __init__(
        self,
        plans: Sequence[Plan],
        policy: Policy,
        listener: socket.socket,
        record: Record,
        explorer: ExplorerConfig | None,
    ) -> None:
        self._plans = plans
        self._policy = policy
        self._listener = listener
        self._record = record
        self._explorer = explorer
        self._processes = Processes()
        self._gateway: GatewayProcess | None = None
        self._discovery: _Discovery | None = None
        self._progress: Progress | None = None
        self._ending = threading.Event()

    @property
    def ready(self) -> list[Plan]:
        """The models that are served."""
        return [plan for plan in self._plans if self._progress and plan.app_name in self._progress.ready]

    @property
    def page(self) -> bool:
        """Whether there is a page at ``/``."""
        return self._gateway is not None and self._gateway.page

    @property
    def failed(self) -> list[str]:
        """The models that failed to start."""
        return self._progress.failed if self._progress else []

    def start(self, stop: StopSignal) -> None:
        """Start all; returns when every model is ready or failed, and the gateway knows the ready ones.

        Raises:
            EngineError: Ray or all models failed to start.
            Stopped: a signal arrived.
        """
        ray_processes = start_ray()
        stop.install()
        stop.check()
        say(f"Logs: {log_folder()}")
        token, created = cluster_secret()
        self._progress = Progress([plan.app_name for plan in self._plans], log_folder())
        settings = {
            "models": describe_models(self._plans, created, self._policy),
            "token": token,
            "policy": self._policy.model_dump(mode="json"),
            "explorer": self._explorer.model_dump(mode="json") if self._explorer else None,
        }
        self._gateway = GatewayProcess(self._listener, settings, say)
        stop.run(lambda: _deploy(self._plans, token))
        self._discovery = _Discovery(self._plans, self._gateway)
        self._wait_until_started(stop)
        self._wait_until_reachable(stop)
        ray_processes.keep_off(self._gateway.taken_cpus)
        keep_off(os.getpid(), self._gateway.taken_cpus)

    def watch(self, stop: StopSignal) -> None:
        """Print every change of a model's state.

        Raises:
            EngineError: contact with Ray Serve was lost.
            Stopped: a signal arrived.
        """
        assert self._progress is not None
        while True:
            stop.wait(WATCH_S)
            for line in self._progress.update(stop.run(_applications)):
                say(line)

    def stop(self) -> None:
        """Drain, then stop all processes."""
        began = time.monotonic()
        self._listener.close()
        drain_s = self._policy.drain_timeout_s
        say(
            f"Stopping: requests in progress have up to {drain_s:g} s to finish. Press Ctrl-C again to stop at once."
            if self._gateway
            else "Stopping."
        )
        if self._gateway:
            self._gateway.stop(drain_s + KILL_GATEWAY_S)
        if self._ending.is_set():
            threading.Event().wait()  # `end` ends the process
        if self._discovery:
            self._discovery.stop()
        stop_ray(self._processes)
        say(f"Stopped in {time.monotonic() - began:.1f} s.")

    def end(self) -> None:
        """Stop all processes at once, and then this one, whatever its other threads do."""
        self._ending.set()
        say("Stopping at once.")
        self._listener.close()
        if self._gateway:
            self._gateway.end()
        self._processes.kill()
        self._record.remove()
        say("Stopped at once.")
        os._exit(STOPPED_AT_ONCE)

    def _wait_until_started(self, stop: StopSignal) -> None:
        """Return when all models are ready or failed; one that fails is reported at once and does not stop the others.

        Raises:
            EngineError: all models failed to start.
        """
        assert self._progress is not None
        while self._progress.starting:
            for line in self._progress.update(stop.run(_applications)):
                say(line)
            if self.failed and not (self._progress.starting or self.ready):
                raise EngineError(f"failed to start: {', '.join(self.failed)}\n  logs: {self._progress.logs}")
            stop.wait(POLL_S)

    def _wait_until_reachable(self, stop: StopSignal) -> None:
        """Return when the gateway knows a replica of every ready model; discovery lags behind Ray Serve by a poll."""
        assert self._gateway is not None
        deadline = time.monotonic() + REACHABLE_S
        ready = {plan.model_id for plan in self.ready}
        while not ready <= set(self._gateway.reachable) and time.monotonic() < deadline:
            stop.wait(0.05)


class _Discovery:
    """Polls Ray Serve for replicas in a thread and sends their addresses to the gateway."""

    def __init__(self, plans: Sequence[Plan], gateway: GatewayProcess) -> None:
        from ray import serve

        self._handles = {plan.model_id: serve.get_app_handle(plan.app_name) for plan in plans}
        self._gateway = gateway
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._poll())
        self._thread = threading.Thread(target=self._run, daemon=True, name="discovery")
        self._thread.start()

    def stop(self) -> None:
        """Stop polling, before Ray ends."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(DISCOVERY_END_S)

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)

    async def _poll(self) -> None:
        while True:
            try:
                await poll_replicas(self._gateway, self._handles)
            except Exception as error:
                say(f"Discovery of replicas failed ({one_line(error)}); starting it again.")
            await asyncio.sleep(DISCOVERY_WAIT_S)


def _deploy(plans: Sequence[Plan], token: str) -> None:
    """Start every application without waiting for it to be ready."""
    from ray import serve

    from quantserve.serve.replica.deployment import model_application  # imports Ray, which `start_ray` does first

    targets = [
        serve.RunTarget(
            model_application(_for_one_machine(plan), token, loopback=True), name=plan.app_name, route_prefix=None
        )
        for plan in plans
    ]
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _for_one_machine(plan: Plan) -> Plan:
    """The plan with one start attempt: on one machine a model that failed to start once fails again."""
    return plan.model_copy(update={"deployment": {"max_constructor_retry_count": 1, **plan.deployment}})


def _applications() -> dict[str, Any]:
    from ray import serve

    try:
        return dict(serve.status().applications)
    except Exception as error:
        message = f"lost contact with the Ray Serve controller ({type(error).__name__}); shutting down"
        raise EngineError(f"{message}\n  logs: {log_folder()}") from error


def _count(plans: Sequence[Plan]) -> str:
    return f"{len(plans)} models" if len(plans) > 1 else plans[0].model_id
