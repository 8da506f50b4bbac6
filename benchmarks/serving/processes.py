"""A server's processes: its whole tree, its processor time, and its pauses."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Sequence
from typing import Final

import psutil  # type: ignore[import-untyped]

from benchmarks.console import BenchError

STOP_S: Final = 30.0
KILL_S: Final = 10.0
LOOKS: Final = 5
"""How often a tree is walked to freeze it: a process may be born meanwhile."""


class Tree:
    """A process and all below it.

    Args:
        pid: of the root, started by us.
    """

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._seen: dict[int, psutil.Process] = {pid: self._root}

    def look(self) -> list[psutil.Process]:
        """The processes there are now; all ever seen are remembered, so that none outlives the root unnoticed."""
        with contextlib.suppress(psutil.Error):
            for process in self._root.children(recursive=True):
                if self._seen.get(process.pid) != process:
                    self._seen[process.pid] = process
        return [process for process in self._seen.values() if alive(process)]

    def cpu_s(self) -> float:
        """Processor time of those that live, in seconds."""
        total = 0.0
        for process in self.look():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def memory(self) -> int:
        """Bytes that only they hold."""
        total = 0
        for process in self.look():
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().uss
        return total

    def freeze(self) -> None:
        """Stop them where they are, so that they use no processor at all."""
        frozen: set[int] = set()
        for _ in range(LOOKS):
            fresh = [process for process in self.look() if process.pid not in frozen]
            if not fresh:
                return
            for process in fresh:
                send(process, signal.SIGSTOP)
                frozen.add(process.pid)

    def thaw(self) -> None:
        """Let them go on."""
        for process in self.look():
            send(process, signal.SIGCONT)

    def stop(
        self, wait: Sequence[tuple[signal.Signals, float]] = ((signal.SIGINT, STOP_S), (signal.SIGTERM, KILL_S))
    ) -> None:
        """End the root as Ctrl-C does, then with more force, then kill what is left of the tree, by id."""
        self.thaw()
        try:
            for number, patience in wait:
                send(self._root, number)
                if gone([self._root], patience):
                    break
        finally:
            left = self.look()
            gone(left, 3.0)
            for process in self.look():
                send(process, signal.SIGKILL)
            gone(left, KILL_S)


def alive(process: psutil.Process) -> bool:
    """Whether it still runs, and is still the same process."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def send(process: psutil.Process, number: signal.Signals) -> None:
    """A signal, unless it is gone."""
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)


def gone(processes: Iterable[psutil.Process], patience_s: float) -> bool:
    """Wait until none of them runs; whether that came true in time."""
    left = list(processes)
    deadline = time.monotonic() + patience_s
    while left := [process for process in left if alive(process)]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def require_memory(models: int, each: int = 2600 << 20) -> None:
    """Refuse to begin what this machine has no memory for.

    Raises:
        BenchError: less is free than so many models take.
    """
    free = psutil.virtual_memory().available
    if free < models * each:
        wanted = f"{models * each / 2**30:.1f} GiB for {models} models"
        raise BenchError(f"{free / 2**30:.1f} GiB of memory are free, {wanted} are wanted")


def all_cpu_s() -> float:
    """Processor time that all processes of this machine used since it started, in seconds."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


def busy_cores(seconds: float = 1.0) -> float:
    """How many cores everything on this machine keeps busy."""
    return float(psutil.cpu_percent(seconds)) / 100 * (os.cpu_count() or 1)
