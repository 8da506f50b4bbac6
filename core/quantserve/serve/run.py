"""`quantserve serve`: plans become Ray Serve applications on this machine, until Ctrl-C."""

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
from quantserve.serve.directory import follow
from quantserve.serve.engine import model_application
from quantserve.serve.gateway_process import GatewayProcess
from quantserve.serve.keys import VARIABLE
from quantserve.serve.limits import Policy
from quantserve.serve.progress import Progress
from quantserve.serve.served import describe_models

POLL_S: Final = 0.5
WATCH_S: Final = 5.0
CALM_S: Final = 5.0
"""Time between two looks for replicas while all are well: a look costs the engines time; nothing is updated here."""
REACHABLE_S: Final = 15.0
"""A model that is lost again before the gateway heard of it does not keep the others from being announced."""
DRAIN_S: Final = 20
"""Longest time that requests in progress get at the end."""
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve_plans(plans: Sequence[Plan], http: HttpConfig, *, keep_going: bool = False) -> int:
    """Serve the planned models behind one address until SIGINT, SIGTERM or SIGHUP; returns the exit code.

    Each model is a Ray Serve application; the front door at the address leads to all of them, by the ``model`` of a
    request at ``/v1`` and by route at ``/MODEL_ID/v1``.

    Args:
        plans: at least one; ids differ.
        http: address, API keys and limits.
        keep_going: serve the models that start when others fail to.

    Raises:
        EngineError: the port is taken, Ray or a model did not start, or Ray died.
        UsageError: the host, the port or the API keys file cannot be used.
    """
    check_routes(plans)
    policy = Policy.of(http)
    listener = listen(http.host, http.port)
    port = int(listener.getsockname()[1])
    if not policy.has_keys and not _is_loopback(http.host):
        _say(f"warning: {http.host} can be reached from other machines and no API keys are set ({VARIABLE})")
    processes = Processes()
    interrupts = Interrupts()
    gateway: GatewayProcess | None = None
    try:
        _say(f"starting Ray and {_count(plans)}")
        ray_processes = start_ray()
        interrupts.install()  # Ray has installed handlers of its own
        processes.look()
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
        _follow(plans, gateway)
        _wait_until_started(progress, processes, interrupts, keep_going)
        ready = [plan for plan in plans if plan.app_name in progress.ready]
        _wait_until_reachable(ready, gateway, interrupts)
        ray_processes.keep_off(gateway.taken_cpus)
        keep_off(os.getpid(), gateway.taken_cpus)
        _announce(ready, len(plans), http.host, port, policy.has_keys)
        _watch(progress, processes, interrupts)
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()
        _stop(gateway, processes, interrupts)
    return 0


class Interrupts:
    """Signals that end serving: the first asks for an orderly stop, the second for a quick one."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self._stopping = False
        self.install()

    def install(self) -> None:
        """Take the signals; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._received)

    def _received(self, number: int, frame: FrameType | None) -> None:
        again = self.event.is_set()
        self.event.set()
        if again or not self._stopping:
            raise KeyboardInterrupt

    def stopping(self) -> None:
        """From now on the first signal is being obeyed."""
        self._stopping = True


def _deploy(plans: Sequence[Plan], token: str) -> None:
    """Start every application, without waiting for any."""
    from ray import serve

    targets = [
        serve.RunTarget(
            model_application(_for_one_machine(plan), token, loopback=True), name=plan.app_name, route_prefix=None
        )
        for plan in plans
    ]
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _follow(plans: Sequence[Plan], gateway: GatewayProcess) -> None:
    """Tell the gateway, from a thread of its own, where Ray Serve's replicas are."""
    from ray import serve

    handles = {plan.model_id: serve.get_app_handle(plan.app_name) for plan in plans}
    threading.Thread(target=lambda: asyncio.run(follow(gateway, handles, CALM_S)), daemon=True, name="follow").start()


def _for_one_machine(plan: Plan) -> Plan:
    """A model that cannot start here will not start at the third attempt either: say so after the first."""
    return plan.model_copy(update={"deployment": {"max_constructor_retry_count": 1, **plan.deployment}})


def _wait_until_started(progress: Progress, processes: Processes, interrupts: Interrupts, keep_going: bool) -> None:
    """Return when all models run, or with `keep_going` when at least one does and the others failed.

    Raises:
        EngineError: a model failed to start and `keep_going` is off, or all did.
    """
    while progress.starting:
        for line in progress.update(_applications()):
            _say(line)
        processes.look()
        if progress.failed and (not keep_going or not (progress.starting or progress.ready)):
            names = ", ".join(progress.failed)
            raise EngineError(f"{names} did not start\n  logs: {progress.logs}")
        interrupts.event.wait(POLL_S)


def _wait_until_reachable(ready: Sequence[Plan], gateway: GatewayProcess, interrupts: Interrupts) -> None:
    """Return when the gateway knows a replica of every model that is ready: a moment later than Ray Serve does."""
    deadline = time.monotonic() + REACHABLE_S
    while not {plan.model_id for plan in ready} <= set(gateway.reachable) and time.monotonic() < deadline:
        interrupts.event.wait(0.05)


def _watch(progress: Progress, processes: Processes, interrupts: Interrupts) -> None:
    """Report what becomes of the models until a signal comes."""
    while not interrupts.event.wait(WATCH_S):
        for line in progress.update(_applications()):
            _say(line)
        processes.look()


def _applications() -> dict[str, Any]:
    from ray import serve

    try:
        return dict(serve.status().applications)
    except Exception as error:
        raise EngineError(f"Ray Serve has stopped answering: {type(error).__name__}") from error


def _stop(gateway: GatewayProcess | None, processes: Processes, interrupts: Interrupts) -> None:
    interrupts.stopping()
    _say("stopping; Ctrl-C again to stop at once")
    began = time.monotonic()
    try:
        if gateway:
            gateway.stop(DRAIN_S + 1)
        killed = stop_ray(processes, graceful=True)
    except KeyboardInterrupt:
        if gateway:
            gateway.stop(0)
        killed = stop_ray(processes, graceful=False)
    _say(f"stopped in {time.monotonic() - began:.1f} s" + (f", {killed} processes killed" if killed else ""))


def _announce(ready: Sequence[Plan], wanted: int, host: str, port: int, keys: bool) -> None:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    base = f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
    first = ready[0]
    width = max(len(plan.model_id) for plan in ready)
    _say("ready:")
    if wanted > 1:
        _say(f"  {'all models':{width}}  {base}/v1")
    for plan in ready:
        _say(f"  {plan.model_id:{width}}  {base}{plan.route_prefix}/v1")
    body = {"model": first.model_id, "messages": [{"role": "user", "content": "What does str.join do?"}]}
    key = ' -H "Authorization: Bearer $KEY"' if keys else ""
    _say("try:")
    _say(f"  curl {base}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'")
    _say("Ctrl-C stops.")


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
        print(line, flush=True)
