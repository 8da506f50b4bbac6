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
from quantserve.serve.signals import shielded

FIRST_WAIT_S: Final = 0.1
LONGEST_WAIT_S: Final = 5.0
SOUND_S: Final = 10.0
"""Uptime after which a crash is not blamed on the settings: the restart backoff begins again."""
HANGS_S: Final = 30.0
"""Heartbeat timeout: a gateway without a heartbeat for so long is killed. It sends one every second."""
WATCH_S: Final = 1.0
END_S: Final = 2.0
"""Time for a gateway to end at once."""


class GatewayProcess:
    """The current gateway process, replaced when it dies.

    Args:
        listener: the listening socket for clients.
        settings: sent to `gateway.serve` as its first line.
        report: called with one line of text when the gateway is restarted.
    """

    def __init__(self, listener: socket.socket, settings: Mapping[str, Any], report: Callable[[str], None]) -> None:
        self._listener = listener
        self._settings = {**settings, "parent": os.getpid()}
        self._report = report
        self._replicas: dict[str, Sequence[Mapping[str, Any]]] = {}
        self._status: dict[str, Any] = {}
        self._silent_s = 0.0
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
                self._send(self._process, {"replicas": places})
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
    def page(self) -> bool:
        """Whether there is a page at ``/``."""
        return bool(self._status.get("page"))

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
        """Stop accepting connections and drain; the process is killed if it has not ended after `patience` seconds."""
        self._stopping = True
        self._listener.close()
        kill = threading.Timer(patience, lambda: self._process.kill())
        kill.start()  # first: a process that hangs may block even the message
        with self._lock:
            self._send(self._process, {"drain": True})
        self._process.wait()
        kill.cancel()

    def end(self) -> None:
        """End the process: it sends errors to the requests in progress and writes its logs, or is killed."""
        self._stopping = True
        self._listener.close()
        process = self._process
        threading.Thread(target=self._close, args=[process], daemon=True).start()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[str]:
        self._status, self._silent_s = {}, 0.0
        descriptor = self._listener.fileno()
        with shielded():
            process = subprocess.Popen(
                [sys.executable, "-m", "quantserve.serve.gateway.process", str(descriptor)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=[descriptor],
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self._send(process, self._settings)
        if self._replicas:
            self._send(process, {"replicas": self._replicas})
            self._make_room(process)
        return process

    def _make_room(self, process: subprocess.Popen[str]) -> None:
        keep_off(process.pid, self.taken_cpus)

    def _keep(self) -> None:
        wait = FIRST_WAIT_S
        while True:
            began = time.monotonic()
            ended = self._follow(self._process)
            if self._stopping:
                return
            wait = FIRST_WAIT_S if time.monotonic() - began > SOUND_S else min(LONGEST_WAIT_S, 2 * wait)
            self._report(f"Gateway process {ended}; restarting it.")
            while not self._restart(wait):
                wait = min(LONGEST_WAIT_S, 2 * wait)

    def _follow(self, process: subprocess.Popen[str]) -> str:
        """Read the status until the process has ended; returns how it ended."""
        assert process.stdout is not None
        for line in process.stdout:
            self._silent_s = 0.0
            with contextlib.suppress(ValueError):
                if isinstance(status := json.loads(line), dict):
                    self._status = status
        code = process.wait()
        self._status = {}
        return f"was killed (signal {-code})" if code < 0 else f"exited (code {code})"

    def _restart(self, wait: float) -> bool:
        """Start a new process after `wait` seconds; returns False when that failed."""
        time.sleep(wait)
        with self._lock:
            try:
                if not self._stopping:
                    self._process = self._start()
            except OSError as error:  # memory, open files or processes are used up
                self._report(f"Gateway process could not be started ({error.strerror}); trying again.")
                return False
        return True

    def _watch(self) -> None:
        while not self._stopping:
            time.sleep(WATCH_S)
            self._silent_s += WATCH_S  # not the clock: this process may have been suspended, too
            if self._silent_s > HANGS_S:
                self._silent_s = 0.0
                self._report(f"Gateway process sent no heartbeat for {HANGS_S:.0f} s; killing it.")
                self._process.kill()

    @staticmethod
    def _send(process: subprocess.Popen[str], message: Mapping[str, Any]) -> None:
        assert process.stdin is not None
        # A process that has just died is replaced, and its successor gets the settings and all replicas.
        with contextlib.suppress(OSError, ValueError):
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()

    @staticmethod
    def _close(process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            process.stdin.close()
