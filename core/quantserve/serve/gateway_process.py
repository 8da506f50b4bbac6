"""The gateway, seen from `quantserve serve`: started, fed, and started again when it dies or hangs.

The listening socket stays open here, so that clients who come while the gateway is being replaced wait for a moment
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
"""A gateway that lived so long did not die of its settings: the next one is started at once."""
HANGS_S: Final = 30.0
"""A gateway that said nothing for so long hangs and is killed; it speaks every second."""
WATCH_S: Final = 1.0
PLACE: Final = ("id", "host", "port", "draining", "cpus")
"""What the gateway must know of a replica."""


class GatewayProcess:
    """The gateway's process and its successors.

    Args:
        listener: where clients come in.
        settings: what `gateway.serve` reads first.
        say: gets a line when a gateway had to be replaced.
    """

    def __init__(self, listener: socket.socket, settings: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._listener = listener
        self._settings = json.dumps(settings)
        self._say = say
        self._replicas: dict[str, Sequence[Mapping[str, Any]]] = {}
        self._told: dict[str, Any] = {}
        self._heard = 0.0
        self._stopping = False
        self._lock = threading.Lock()
        self._process = self._start()
        for work in (self._keep, self._watch):
            threading.Thread(target=work, daemon=True, name="gateway").start()

    def update(self, addresses: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Tell the gateway where replicas are, when that has changed, and keep it off the CPUs they compute on."""
        places = {
            model_id: [{key: replica[key] for key in PLACE} for replica in replicas]
            for model_id, replicas in addresses.items()
        }
        with self._lock:
            if any(self._replicas.get(model_id) != there for model_id, there in places.items()):
                self._replicas.update(places)
                self._send(self._process, json.dumps(places))
                self._make_room(self._process)

    @property
    def wanted(self) -> list[str]:
        """Models that requests wait for and that have no replica."""
        return list(self._told.get("wanted", ()))

    @property
    def reachable(self) -> list[str]:
        """Models whose requests the gateway takes."""
        return list(self._told.get("reachable", ()))

    @property
    def settled(self) -> bool:
        """Whether the gateway expects no replica to come or to go."""
        return bool(self._told.get("settled"))

    @property
    def taken_cpus(self) -> set[int]:
        """CPUs on which engines compute and everything else should not."""
        return {cpu for there in self._replicas.values() for one in there for cpu in one["cpus"]}

    def stop(self, patience: float) -> None:
        """Take no more connections; give requests in progress `patience` seconds."""
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
        self._told, self._heard = {}, time.monotonic()
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
                self._heard = time.monotonic()
                with contextlib.suppress(ValueError):
                    self._told = json.loads(line)
            code = process.wait()
            if self._stopping:
                return
            lived = time.monotonic() - began
            wait = FIRST_WAIT_S if lived > SOUND_S else min(LONGEST_WAIT_S, 2 * wait)
            reason = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            self._say(f"the front door died ({reason}) and is started again")
            time.sleep(wait)
            with self._lock:
                if self._stopping:
                    return
                self._process = self._start()

    def _watch(self) -> None:
        while not self._stopping:
            time.sleep(WATCH_S)
            if time.monotonic() - self._heard > HANGS_S:
                self._heard = time.monotonic()
                self._say(f"the front door has not answered for {HANGS_S:.0f} s")
                self._process.kill()

    @staticmethod
    def _send(process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        # One that has just died is replaced, and its successor told everything.
        with contextlib.suppress(OSError, ValueError):
            process.stdin.write(line + "\n")
            process.stdin.flush()
