"""Starts a private Ray cluster on this machine, and stops it without leaving a process behind."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]

from quantserve.errors import EngineError, UsageError, one_line
from quantserve.serve.cpus import keep_off, step_back
from quantserve.serve.driver.announce import say
from quantserve.serve.driver.processes import Processes
from quantserve.serve.signals import shielded
from quantserve.system.homes import free_bytes, look, ray_fault, settle

BACKLOG: Final = 2048
SECRET: Final = b"quantserve-secret"
OBJECT_STORE_BYTES: Final = 512 << 20
"""Size of Ray's shared memory. Little passes through it: plans, and the answers of the replicas to discovery."""
IDLE: Final = {
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "false",
    "RAY_event_stats": "false",
    "RAY_prestart_worker_first_driver": "false",
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    "RAY_object_manager_timer_freq_ms": "1000",
    "RAY_gcs_pull_resource_loads_period_milliseconds": "10000",
    "RAY_io_context_monitor_probe_interval_ms": "10000",
}
"""By default Ray's processes poll ten times a second, collect metrics that nothing here reads and keep an idle worker.
These settings leave that CPU time to the engine.
"""
CONNECT: Final = {
    "RAY_raylet_client_connect_timeout_milliseconds": "50",
    "RAY_raylet_client_num_connect_attempts": "200",
}
"""Ray's connection retries: the default 10 s in total, in steps of 50 ms. In a third of all starts the object store was
not listening yet at the first attempt, and Ray's own step cost a second.
"""
ROOM_BYTES: Final = 64 << 20
"""Free space that Ray's session folder needs at the start; with less Ray hangs for a minute without a message."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on `port`, or on a free one for 0.

    Raises:
        EngineError: the port is in use.
        UsageError: the host is no address of this machine, or binding the port is not permitted.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UsageError(_cannot_bind(host, port, error)) from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if isinstance(error, PermissionError):
            fix = "use --port 8000 (any port above 1023), or grant CAP_NET_BIND_SERVICE"
            raise UsageError(f"cannot bind port {port}: permission denied\n  fix: {fix}") from None
        if error.errno == errno.EADDRINUSE:
            fix = "stop the process that listens there, or choose another port with --port (0 picks a free one)"
            raise EngineError(f"port {port} on {host} is already in use\n  fix: {fix}") from None
        raise UsageError(_cannot_bind(host, port, error)) from None
    return listener


def _cannot_bind(host: str, port: int, error: OSError) -> str:
    fix = "use an address of this machine: 127.0.0.1 for local clients only, 0.0.0.0 for every interface"
    return f"cannot listen on --host {host}, port {port}: {error.strerror}\n  fix: {fix}"


def start_ray() -> RayProcesses:
    """Start a private Ray and Ray Serve, without Serve's HTTP proxy; ``RAY_ADDRESS`` is ignored.

    Returns:
        Ray's own processes, which run beside the replicas.

    Raises:
        EngineError: Ray failed to start, its session folder has too little free space, or no folder can be written.
    """
    for note in settle(os.environ):  # Ray's workers and the engines inherit it
        say(f"note: {note}")
    folder = look(os.environ).folders["RAY_TMPDIR"]
    if fault := ray_fault(folder):
        raise EngineError(f"RAY_TMPDIR {folder} {fault}\n  fix: set RAY_TMPDIR to a short path that can be written")
    check_room(Path(folder), ROOM_BYTES)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray gives its workers, and so our engines, a lower CPU priority than every other process.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # When any process nearly exhausts memory, Ray kills its newest or smallest worker, such as Serve's controller. The
    # kernel kills the largest process, and only when no memory is left.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    for name, value in {**IDLE, **CONNECT}.items():
        os.environ.setdefault(name, value)
    # When the connection to the raylet breaks, as it does while we stop, Ray ends this process without a word if its
    # parent is process 1, as under systemd. With this number Ray looks instead whether that process runs. Workers get
    # the raylet's own number.
    os.environ["RAY_RAYLET_PID"] = str(os.getpid())
    import ray
    from ray import serve
    from ray._private import auto_init_hook, utils

    # A call by a thread that still runs when Ray has ended would start Ray again. The variable is read at the import.
    auto_init_hook.enable_auto_connect = False
    # Ray's handler of SIGTERM would end this process without draining.
    utils.set_sigterm_handler = lambda handler: None
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with shielded():
            ray.init(
                address="local",
                namespace="serve",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
            )
        serve.start(proxy_location="Disabled")
        started = RayProcesses()
    except Exception as error:
        raise EngineError(f"Ray failed to start: {one_line(error)}") from error
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return started


class RayProcesses:
    """Ray's own processes and Serve's controller, which run at a lower CPU priority than the engines."""

    def __init__(self) -> None:
        self._all: list[tuple[int, bool]] = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                # The raylet's first thread starts the replicas, which would inherit its priority.
                self._all.append((process.pid, process.name() == "raylet"))
        for pid, but_first in self._all:
            step_back(pid, but_first=but_first)

    def keep_off(self, cpus: Collection[int]) -> None:
        """Leave these CPUs to the engines."""
        for pid, but_first in self._all:
            keep_off(pid, cpus, but_first=but_first)


def check_room(folder: Path, wanted: int) -> None:
    """Check that a folder's file system has `wanted` bytes free.

    Raises:
        EngineError: it has fewer.
    """
    if (free := free_bytes(folder)) < wanted:
        raise EngineError(
            f"too little free space in {folder} for Ray's session: {free / 2**20:.0f} MiB, {wanted >> 20} MiB needed\n"
            "  fix: free some space, or set RAY_TMPDIR to another folder"
        )


def cluster_secret() -> tuple[str, int]:
    """The token that the gateway presents to replicas, and when models were first deployed here (Unix time).

    Both are constant for the life of the cluster, so that deploying a config again restarts only what changed.
    """
    import ray
    from ray.experimental import internal_kv

    fresh = json.dumps([secrets.token_hex(32), int(time.time())]).encode()
    if not ray.is_initialized():
        token, created = json.loads(fresh)
        return token, created
    internal_kv._internal_kv_put(SECRET, fresh, overwrite=False)
    token, created = json.loads(internal_kv._internal_kv_get(SECRET) or fresh)
    return token, created


def log_folder() -> str:
    """Folder of the logs of Ray's processes, including the engines."""
    import ray

    node = getattr(ray._private.worker, "_global_node", None)
    return str(node.get_logs_dir_path()) if node else "/tmp/ray/session_latest/logs"


def stop_ray(processes: Processes) -> None:
    """Stop Ray and the replicas at once; the gateway has drained by now.

    Ray's own way waits for replicas that are still starting, and sends its processes SIGTERM, which they do not get.
    """
    with _silent():  # Ray prints the end of its own processes as failures
        processes.kill()
        if ray := sys.modules.get("ray"):
            with contextlib.suppress(Exception):
                ray.shutdown()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Discard what Python and C++ code prints."""
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), open(os.devnull, "w") as null:
        stderr = os.dup(2)
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
