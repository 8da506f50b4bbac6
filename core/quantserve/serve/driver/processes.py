"""The processes that a server starts, directly or not."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from typing import Final

import psutil  # type: ignore[import-untyped]

KILL_S: Final = 10.0
"""Longest time to kill all processes."""
TRACKERS_S: Final = 5.0
"""Time for trackers of shared memory to end by themselves, after the others."""
REAP_AFTER_S: Final = 5.0
REAP_EVERY_S: Final = 1.0
PR_SET_CHILD_SUBREAPER: Final = 36


class Processes:
    """All descendants of this process, so that none outlives it.

    Orphans among them become children of this process, as in a container, where it may be process 1. A thread reaps
    them: the main thread may wait for Ray, which answers late on a busy machine.
    """

    def __init__(self) -> None:
        self._ended: dict[int, float] = {}
        with contextlib.suppress(OSError, AttributeError):  # not on Linux
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        threading.Thread(target=self._reap, daemon=True, name="reaper").start()

    def _reap(self) -> None:
        while True:
            time.sleep(REAP_EVERY_S)
            self._reap_orphans()

    def _reap_orphans(self) -> None:
        """Reap orphans that ended some time ago. Other children are reaped by the code that started them."""
        ended = {process.pid for process in psutil.Process().children() if _has_ended(process)}
        now = time.monotonic()
        self._ended = {pid: self._ended.get(pid, now) for pid in ended}
        for pid, since in self._ended.items():
            if now - since > REAP_AFTER_S:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)

    def kill(self) -> None:
        """Kill them all, parents first; returns when none is left, or after `KILL_S`.

        Trackers of shared memory end last and by themselves, because they remove what the others leave.
        """
        began = others = time.monotonic()
        while (alive := self._alive()) and (now := time.monotonic()) - began < KILL_S:
            if doomed := [process for process in alive if not _is_tracker(process)]:
                others = now
            for process in doomed if now - others < TRACKERS_S else alive:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(alive, timeout=0.2)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    @staticmethod
    def _alive() -> list[psutil.Process]:
        return [process for process in psutil.Process().children(recursive=True) if not _has_ended(process)]


def _has_ended(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return True


def _is_tracker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        command = process.cmdline()  # empty for a moment while a process starts, and that may be a tracker
        return not command or any("multiprocessing.resource_tracker" in argument for argument in command)
    return False
