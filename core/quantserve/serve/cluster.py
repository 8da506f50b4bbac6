"""A Ray of our own on this machine: its start, and a stop that leaves no process behind."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]

from quantserve.errors import EngineError, UsageError, one_line
from quantserve.serve.cpus import keep_off, step_back

KILL_AFTER_S: Final = 10.0
BACKLOG: Final = 2048
SECRET: Final = b"quantserve-secret"
OBJECT_STORE_BYTES: Final = 512 << 20
"""Ray's shared memory; only requests and answers pass through it."""
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
"""Ray's processes look around ten times a second, count what nobody here reads and keep a worker for tasks that never
come; the engine needs the time more.
"""
CONNECT: Final = {
    "RAY_raylet_client_connect_timeout_milliseconds": "50",
    "RAY_raylet_client_num_connect_attempts": "200",
}
"""A third of all starts lost a second, because Ray's object store was not listening yet when it was first asked: the
same ten seconds of trying, in shorter steps.
"""
ROOM_BYTES: Final = 64 << 20
"""Ray's session folder needs so much at the start; without it Ray waits for a minute and says nothing of it."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on `port`, or on a free one for 0.

    Raises:
        EngineError: the port is taken.
        UsageError: the host is no address of this machine, or the port needs privileges.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UsageError(f"--host {host}: {error.strerror}") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if isinstance(error, PermissionError):
            raise UsageError(f"port {port} needs privileges\n  fix: choose one above 1023 with --port") from None
        if error.errno == errno.EADDRINUSE:
            fix = "stop what listens there, or choose another with --port (0 picks a free one)"
            raise EngineError(f"port {port} on {host} is already in use\n  fix: {fix}") from None
        raise UsageError(f"--host {host}: {error.strerror}") from None
    return listener


def start_ray() -> RayProcesses:
    """Start Ray and Ray Serve in processes of our own, whatever ``RAY_ADDRESS`` says; clients come in by our gateway.

    Returns:
        What was started, which runs beside the replicas.

    Raises:
        EngineError: Ray did not start, or there is no room for its session.
    """
    check_room(Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"), ROOM_BYTES)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray lowers the priority of its workers, and with them of our engines, below everything else on the machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # When the machine's memory is nearly used up, by whomever, Ray kills what it started last or what is smallest, such
    # as Serve's controller. The kernel kills what is largest, and only when there is none left.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    for name, value in {**IDLE, **CONNECT}.items():
        os.environ.setdefault(name, value)
    import ray
    from ray import serve

    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
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
        raise EngineError(f"Ray did not start: {one_line(error)}") from error
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return started


class RayProcesses:
    """Ray's own processes and Serve's controller: all below this process now. They let the engines go first."""

    def __init__(self) -> None:
        self._all: list[tuple[int, bool]] = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                # Replicas come from the raylet's first thread, and would be like it.
                self._all.append((process.pid, process.name() == "raylet"))
        for pid, but_first in self._all:
            step_back(pid, but_first=but_first)

    def keep_off(self, cpus: Collection[int]) -> None:
        """Leave these CPUs to the engines."""
        for pid, but_first in self._all:
            keep_off(pid, cpus, but_first=but_first)


def check_room(folder: Path, wanted: int) -> None:
    """See whether a folder's file system has `wanted` bytes left.

    Raises:
        EngineError: it has not.
    """
    if (free := free_bytes(folder)) < wanted:
        raise EngineError(
            f"no space left in {folder} for Ray's session: {free / 2**20:.0f} MiB free, {wanted >> 20} MiB needed\n"
            "  fix: make room, or name another folder in RAY_TMPDIR"
        )


def free_bytes(folder: Path) -> int:
    """Free bytes of the file system that a folder is on, or will be on."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def cluster_secret() -> tuple[str, int]:
    """What the front door shows to replicas, and when models were first deployed here (Unix time).

    Both stay the same while the cluster lives, so that deploying a config anew restarts only what has changed.
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
    """Where Ray writes the logs of its processes, the engines' included."""
    import ray

    node = getattr(ray._private.worker, "_global_node", None)
    return str(node.get_logs_dir_path()) if node else "/tmp/ray/session_latest/logs"


class Processes:
    """The processes below this one, remembered so that none outlives us."""

    def __init__(self) -> None:
        self._seen: dict[int, psutil.Process] = {}

    def look(self) -> None:
        """Remember the processes there are now."""
        for process in psutil.Process().children(recursive=True):
            known = self._seen.get(process.pid)
            if known is None or known.create_time() != process.create_time():
                self._seen[process.pid] = process

    def stop(self, patience: float = KILL_AFTER_S) -> int:
        """Wait for all of them to end, then kill the rest; returns how many had to be killed."""
        deadline = time.monotonic() + patience
        while (alive := list(self._alive())) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=5)
        return len(alive)

    def _alive(self) -> Iterator[psutil.Process]:
        for process in self._seen.values():
            # is_running compares the start time, so that another process with the same id is not taken for ours.
            with contextlib.suppress(psutil.Error):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    yield process


def stop_ray(processes: Processes, *, graceful: bool) -> int:
    """Stop Serve (replicas finish first when `graceful`) and Ray; returns how many processes had to be killed."""
    import ray
    from ray import serve

    processes.look()
    # Ray reports the end of its own processes as failures, on whatever sys.stdout is at that time.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if graceful and ray.is_initialized():  # or this would start a Ray in order to stop it
            with contextlib.suppress(Exception):
                serve.shutdown()
            processes.look()
        with contextlib.suppress(Exception):
            ray.shutdown()
    return processes.stop(KILL_AFTER_S if graceful else 1.0)
