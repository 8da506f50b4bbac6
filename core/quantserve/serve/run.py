"""`quantserve serve`: runs plans as Ray Serve applications on this machine until it gets a signal to stop."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, Final

from quantserve.config import HttpConfig
from quantserve.errors import EngineError
from quantserve.plan import Plan
from quantserve.serve.app import check_routes
from quantserve.serve.cluster import Processes, cluster_secret, listen, log_folder, start_ray, stop_ray
from quantserve.serve.cpus import keep_off
from quantserve.serve.discovery import CALM_S, poll_replicas
from quantserve.serve.engine import model_application
from quantserve.serve.gateway_process import GatewayProcess
from quantserve.serve.keys import VARIABLE
from quantserve.serve.limits import Policy
from quantserve.serve.progress import Progress
from quantserve.serve.served import describe_models
from quantserve.text import escaped

POLL_S: Final = 0.5
WATCH_S: Final = 5.0
REACHABLE_S: Final = 15.0
"""Longest wait until the gateway knows all replicas; a model lost in between does not delay the others."""
DRAIN_S: Final = 20
"""Drain timeout: how long requests in progress may take to finish at shutdown."""
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve_plans(plans: Sequence[Plan], http: HttpConfig, *, keep_going: bool = False) -> int:
    """Serve the planned models behind one address until SIGINT, SIGTERM or SIGHUP; returns the exit code.

    Each model is a Ray Serve application. The gateway at the address routes to all of them: at ``/v1`` by the ``model``
    field of a request, at ``/MODEL_ID/v1`` by path.

    Args:
        plans: at least one; ids differ.
        http: address, API keys and limits.
        keep_going: return 0 although some models failed to start; otherwise 4 then.

    Raises:
        EngineError: the port is in use, Ray or all models failed to start, or Ray died.
        UsageError: the host, the port or the API keys file cannot be used.
    """
    check_routes(plans)
    policy = Policy.of(http)
    listener = listen(http.host, http.port)
    port = int(listener.getsockname()[1])
    if not policy.has_keys and not _is_loopback(http.host):
        _say(
            f"Warning: listening on {http.host} without API keys: anyone who can reach this machine can use the API. "
            f"Set {VARIABLE} or --api-keys-file."
        )
    processes = Processes()
    interrupts = Interrupts()
    gateway: GatewayProcess | None = None
    progress: Progress | None = None
    try:
        _say(f"Starting Ray and {_count(plans)}; small models take 30 to 90 s, large ones several minutes.")
        ray_processes = start_ray()
        interrupts.install()  # Ray has replaced the handlers
        processes.scan()
        _say(f"Logs: {log_folder()}")
        token, created = cluster_secret()
        progress = Progress([plan.app_name for plan in plans], log_folder())
        gateway = GatewayProcess(
            listener,
            {
                "models": describe_models(plans, created, policy),
                "token": token,
                "policy": policy.model_dump(mode="json"),
                "drain_s": DRAIN_S,
            },
            _say,
        )
        _deploy(plans, token)
        _start_discovery(plans, gateway)
        _wait_until_started(progress, processes, interrupts)
        ready = [plan for plan in plans if plan.app_name in progress.ready]
        _wait_until_reachable(ready, gateway, interrupts)
        ray_processes.keep_off(gateway.taken_cpus)
        keep_off(os.getpid(), gateway.taken_cpus)
        _announce(ready, len(plans), http.host, port, policy.has_keys)
        if progress.failed:
            _say(f"Not served, because they failed to start (reasons above): {', '.join(progress.failed)}")
        _watch(progress, processes, interrupts)
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()
        _stop(gateway, processes, interrupts)
    return EngineError.exit_code if progress and progress.failed and not keep_going else 0


class Interrupts:
    """Signals that end serving: the first one drains and stops, the second one stops at once."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self._stopping = False
        self.install()

    def install(self) -> None:
        """Install the signal handlers; Python allows that in the main thread only."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._received)

    def _received(self, number: int, frame: FrameType | None) -> None:
        again = self.event.is_set()
        self.event.set()
        if again or not self._stopping:
            raise KeyboardInterrupt

    def stopping(self) -> None:
        """Shutdown has begun: the next signal stops at once."""
        self._stopping = True


def _deploy(plans: Sequence[Plan], token: str) -> None:
    """Start every application without waiting for it to be ready."""
    from ray import serve

    targets = [
        serve.RunTarget(
            model_application(_for_one_machine(plan), token, loopback=True), name=plan.app_name, route_prefix=None
        )
        for plan in plans
    ]
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _start_discovery(plans: Sequence[Plan], gateway: GatewayProcess) -> None:
    """Poll Ray Serve for replicas in a thread and send their addresses to the gateway."""
    from ray import serve

    handles = {plan.model_id: serve.get_app_handle(plan.app_name) for plan in plans}
    polling = poll_replicas(gateway, handles, CALM_S)
    threading.Thread(target=asyncio.run, args=(polling,), daemon=True, name="discovery").start()


def _for_one_machine(plan: Plan) -> Plan:
    """The plan with one start attempt: on one machine a model that failed to start once fails again."""
    return plan.model_copy(update={"deployment": {"max_constructor_retry_count": 1, **plan.deployment}})


def _wait_until_started(progress: Progress, processes: Processes, interrupts: Interrupts) -> None:
    """Return when all models are ready or failed; one that fails is reported at once and does not stop the others.

    Raises:
        EngineError: all models failed to start.
    """
    while progress.starting:
        for line in progress.update(_applications()):
            _say(line)
        processes.scan()
        if progress.failed and not (progress.starting or progress.ready):
            names = ", ".join(progress.failed)
            raise EngineError(f"failed to start: {names}\n  logs: {progress.logs}")
        interrupts.event.wait(POLL_S)


def _wait_until_reachable(ready: Sequence[Plan], gateway: GatewayProcess, interrupts: Interrupts) -> None:
    """Return when the gateway knows a replica of every ready model; discovery lags behind Ray Serve by one poll."""
    deadline = time.monotonic() + REACHABLE_S
    while not {plan.model_id for plan in ready} <= set(gateway.reachable) and time.monotonic() < deadline:
        interrupts.event.wait(0.05)


def _watch(progress: Progress, processes: Processes, interrupts: Interrupts) -> None:
    """Print every change of a model's state until a signal arrives."""
    while not interrupts.event.wait(WATCH_S):
        for line in progress.update(_applications()):
            _say(line)
        processes.scan()


def _applications() -> dict[str, Any]:
    from ray import serve

    try:
        return dict(serve.status().applications)
    except Exception as error:
        message = f"lost contact with the Ray Serve controller ({type(error).__name__}); shutting down"
        raise EngineError(f"{message}\n  logs: {log_folder()}") from error


def _stop(gateway: GatewayProcess | None, processes: Processes, interrupts: Interrupts) -> None:
    interrupts.stopping()
    _say(f"Stopping: requests in progress have up to {DRAIN_S} s to finish. Press Ctrl-C again to stop at once.")
    began = time.monotonic()
    try:
        if gateway:
            gateway.stop(DRAIN_S + 1)
        killed = stop_ray(processes, graceful=True)
    except KeyboardInterrupt:
        if gateway:
            gateway.stop(0)
        killed = stop_ray(processes, graceful=False)
    _say(f"Stopped in {time.monotonic() - began:.1f} s." + (f" {killed} processes had to be killed." if killed else ""))


def _announce(ready: Sequence[Plan], wanted: int, host: str, port: int, keys: bool) -> None:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    base = f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
    first = ready[0]
    together = ["all models"] if wanted > 1 else []
    width = max(map(len, [*together, *(plan.model_id for plan in ready)]))
    _say("Ready:")
    for name in together:
        _say(f"  {name:{width}}  {base}/v1")
    for plan in ready:
        _say(f"  {plan.model_id:{width}}  {base}{plan.route_prefix}/v1")
    body = {"model": first.model_id, "messages": [{"role": "user", "content": "What does str.join do?"}]}
    key = ' -H "Authorization: Bearer $KEY"' if keys else ""
    _say("Try:")
    _say(f"  curl {base}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'")
    _say("Press Ctrl-C to stop.")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _count(plans: Sequence[Plan]) -> str:
    return f"{len(plans)} models" if len(plans) > 1 else plans[0].model_id


def _say(line: str) -> None:
    # The terminal or the pipe may be gone while there is still a server to stop.
    with contextlib.suppress(OSError):
        print(escaped(line, "\n"), flush=True)
