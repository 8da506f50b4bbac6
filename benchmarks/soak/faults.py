"""The faults of a soak, one after the other, and how long each of them lasted."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import cycle
from time import time
from typing import Final

import psutil  # type: ignore[import-untyped]

from benchmarks.soak.clients import Users
from benchmarks.soak.server import MODELS, Server, is_gone

RECOVERY_S: Final = 240.0
"""Longest time until all replicas are ready again: a cold start on busy cores."""
NOTICED_S: Final = 5.0
"""The earliest end of a fault: a process that has just died may still be counted as ready."""
STOPPED_S: Final = 8.0
"""Pause of a stopped replica: shorter than every timeout, so nothing may be lost."""
STORM: Final = 150
POLL_S: Final = 1.0
ORDER: Final = (
    ("engine core killed", "fp16"),
    ("gateway killed", ""),
    ("worker killed", "awq"),
    ("replica paused", "fp16"),
    ("replica killed", "fp16"),
    ("client storm", ""),
    ("replica killed", "awq"),
    ("replica paused", "awq"),
)
"""Faults and the model they concern."""


@dataclass
class Fault:
    """One fault; times are Unix times.

    Attributes:
        model: its model; empty if it concerns all of them.
        loses: whether requests in progress may be lost.
        until: when all replicas were ready again; 0 if that took longer than `RECOVERY_S`.
        victims: ids of the replicas that were lost.
        only: whether the model has no other replica.
    """

    name: str
    model: str = ""
    loses: bool = True
    at: float = 0.0
    until: float = 0.0
    victims: list[str] = field(default_factory=list)
    only: bool = False


class Faults:
    """Causes one fault after the other, in the order of `ORDER`.

    Args:
        only: names of the faults to cause; all if empty.

    Attributes:
        done: the faults so far, the current one included.
        calm: whether none is being recovered from.
    """

    def __init__(self, server: Server, users: Users, report: Callable[[str], None], only: Collection[str] = ()) -> None:
        self.done: list[Fault] = []
        self.calm = True
        self._server = server
        self._users = users
        self._report = report
        causes = {
            "engine core killed": self._engine,
            "gateway killed": self._gateway,
            "worker killed": self._worker,
            "replica paused": self._pause,
            "replica killed": self._replica,
            "client storm": self._storm,
        }
        self._next = cycle((name, model, causes[name]) for name, model in ORDER if not only or name in only)

    async def one(self) -> Fault | None:
        """Cause the next fault and wait until all replicas are ready again; None where its model has no replica."""
        name, model, cause = next(self._next)
        if model and not await asyncio.to_thread(self._server.replicas, model):
            self._report(f"{name} ({model}) skipped: the model has no replica")
            return None
        before = (await asyncio.to_thread(self._server.replica_ids)).get(model, set())
        fault = Fault(name, model, only=bool(model) and MODELS[model][1] == 1, at=time())
        self.done.append(fault)
        self._report(f"{name}{f' ({model})' if model else ''}")
        self.calm = False
        killed = await cause(fault)
        if await self._recovered(fault, killed):
            fault.until = time()
            after = (await asyncio.to_thread(self._server.replica_ids)).get(model, set())
            fault.victims = sorted(before - after) if fault.loses else []
            self._report(f"  recovered in {fault.until - fault.at:.0f} s")
        self.calm = True
        return fault

    async def _recovered(self, fault: Fault, killed: psutil.Process | None) -> bool:
        while time() < fault.at + RECOVERY_S:
            await asyncio.sleep(POLL_S)
            sound = (killed is None or is_gone(killed)) and await asyncio.to_thread(self._server.complete)
            if sound and time() > fault.at + NOTICED_S:
                return True
        return False

    async def _engine(self, fault: Fault) -> psutil.Process:
        return self._kill(self._engines(fault.model)[0])

    async def _worker(self, fault: Fault) -> psutil.Process:
        return self._kill(self._engines(fault.model)[-1])

    async def _replica(self, fault: Fault) -> psutil.Process:
        return self._kill(self._server.replicas(fault.model)[0])

    async def _gateway(self, fault: Fault) -> psutil.Process:
        return self._kill(self._server.by_role()["gateway"][0])

    async def _pause(self, fault: Fault) -> psutil.Process | None:
        fault.loses = False
        process = self._server.replicas(fault.model)[0]
        process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(STOPPED_S)
        finally:
            process.send_signal(signal.SIGCONT)
        return None

    async def _storm(self, fault: Fault) -> psutil.Process | None:
        fault.loses = False
        await self._users.burst(STORM)
        return None

    def _engines(self, model: str) -> list[psutil.Process]:
        """Processes of the first replica's engine: the core, then its workers."""
        children = self._server.replicas(model)[0].children(recursive=True)
        return [child for child in children if child.name().startswith("VLLM::")]

    @staticmethod
    def _kill(process: psutil.Process) -> psutil.Process:
        process.kill()
        return process
