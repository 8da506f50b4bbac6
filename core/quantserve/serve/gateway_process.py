"""Supervises the gateway process: starts it, sends it the replicas, and restarts it when it dies or hangs.

The listening socket stays open in this process, so that clients that connect during a restart wait in the backlog
instead of being refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from quantserve.serve.cpus import keep_off

FIRST_WAIT_S: Final = 0.1
LONGEST_WAIT_S: Final = 5.0
SOUND_S: Final = 10.0
"""Uptime after which a crash is not blamed on the settings: the restart backoff begins again."""
HANGS_S: Final = 30.0
"""Heartbeat timeout: a gateway without a heartbeat for so long is killed. It sends one every second."""
WATCH_S: Final = 1.0


class GatewayProcess:
    """The current gateway process, replaced when it dies.

    Args:
        listener: the listening socket for clients.
        settings: sent to `gateway.serve` as its first line.
        report: called with one line of text when the gateway is restarted.
    """

    def __init__(self, listener: socket.socket, settings: Mapping[str, Any], report: Callable[[str], None]) -> None:
        self._listener = listener
        self._settings = json.dumps(settings)
        self._report = report
        self._replicas: dict[str, Sequence[Mapping[str, Any]]] = {}
        self._status: dict[str, Any] = {}
        self._last_heartbeat = 0.0
        self._stopping = False
        self._lock = threading.Lock()
        self._process = self._start()
        for work in (self._keep, self._watch):
            threading.Thread(target=work, daemon=True, name="gateway").start()

    def update(self, addresses: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Send changed replicas to the gateway, and keep it off the CPUs they compute on."""
        places = {model_id: [dict(replica) for replica in replicas] for model_id, replicas in addresses.items()}
        with self._lock:
            if any(self._replicas.get(model_id) != there for model_id, there in places.items()):
                self._replicas.update(places)
                self._send(self._process, json.dumps(places))
                self._make_room(self._process)

    @property
    def wanted(self) -> list[str]:
        """Models with queued requests and no replica."""
        return list(self._status.get("wanted", ()))

    @property
    def reachable(self) -> list[str]:
        """Models whose requests the gateway accepts."""
        return list(self._status.get("reachable", ()))

    @property
    def settled(self) -> bool:
        """Whether all replicas are healthy and no request is queued."""
        return bool(self._status.get("settled"))

    @property
    def waiting(self) -> dict[str, int]:
        """Number of queued requests by model id."""
        return dict(self._status.get("waiting", {}))

    @property
    def taken_cpus(self) -> set[int]:
        """CPUs reserved for the engines' computing threads."""
        return {cpu for there in self._replicas.values() for one in there for cpu in one.get("cpus", ())}

    def stop(self, patience: float) -> None:
        """Stop accepting connections and drain: requests in progress have `patience` seconds to finish."""
        self._stopping = True
        self._listener.close()
        with self._lock:
            process = self._process
        process.terminate()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)

    def _start(self) -> subprocess.Popen[str]:
        self._status, self._last_heartbeat = {}, time.monotonic()
        descriptor = self._listener.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", "quantserve.serve.gateway", str(descriptor)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[descriptor],
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self._send(process, self._settings)
        if self._replicas:
            self._send(process, json.dumps(self._replicas))
            self._make_room(process)
        return process

    def _make_room(self, process: subprocess.Popen[str]) -> None:
        keep_off(process.pid, self.taken_cpus)

    def _keep(self) -> None:
        wait = FIRST_WAIT_S
        while True:
            process, began = self._process, time.monotonic()
            assert process.stdout is not None
            for line in process.stdout:
                self._last_heartbeat = time.monotonic()
                with contextlib.suppress(ValueError):
                    self._status = json.loads(line)
            code = process.wait()
            if self._stopping:
                return
            lived = time.monotonic() - began
            wait = FIRST_WAIT_S if lived > SOUND_S else min(LONGEST_WAIT_S, 2 * wait)
            ended = f"was killed (signal {-code})" if code < 0 else f"exited (code {code})"
            self._report(f"Gateway process {ended}; restarting it.")
            time.sleep(wait)
            with self._lock:
                if self._stopping:
                    return
                self._process = self._start()

    def _watch(self) -> None:
        while not self._stopping:
            time.sleep(WATCH_S)
            if time.monotonic() - self._last_heartbeat > HANGS_S:
                self._last_heartbeat = time.monotonic()
                self._report(f"Gateway process sent no heartbeat for {HANGS_S:.0f} s; killing it.")
                self._process.kill()

    @staticmethod
    def _send(process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        # A process that has just died is replaced, and its successor gets the settings and all replicas.
        with contextlib.suppress(OSError, ValueError):
            process.stdin.write(line + "\n")
            process.stdin.flush()
