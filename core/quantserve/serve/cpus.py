"""Keeping other processes out of an engine's way.

vLLM binds the threads that compute on a CPU to all cores but a few. A process of ours that runs on one of these cores
stops a thread, and with it the step that all requests wait for. On the other cores the engine core waits for a step's
end to begin the next one, and what keeps it from that is as bad.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Set
from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]

STEP_BACK: Final = 10
"""How much nicer than we are is what is not in a hurry: a tenth of the time where both want it, and when we yield."""
NICEST: Final = 19
GIVEN: Final = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()
"""The CPUs that this process was started with."""


def leave_to_workers(reserved: int = 0) -> set[int]:
    """Keep this process and those it started off the CPUs that some of the latter are bound to.

    Where nothing is bound, several engines share the CPUs and all their processes need them: only this one is kept off.

    Args:
        reserved: how many CPUs are not for workers where those are not bound.

    Returns:
        Those CPUs; none where no CPU would be left.
    """
    if not GIVEN:
        return set()
    masks: dict[int, Set[int]] = {os.getpid(): GIVEN}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            masks[process.pid] = set(process.cpu_affinity())
    bound = {cpu for mask in masks.values() if mask < GIVEN for cpu in mask}
    if not bound and reserved:
        bound, masks = set(sorted(GIVEN)[:-reserved]), {os.getpid(): GIVEN}
    if bound >= GIVEN:
        return set()
    for pid, mask in masks.items():
        if mask == GIVEN:
            keep_off(pid, bound)
    return bound


def keep_off(pid: int, bound: Collection[int], *, but_first: bool = False) -> None:
    """Let a process's threads run on all CPUs that this one was given, except `bound`; on all when none is left.

    Args:
        pid: the process.
        bound: CPUs to leave.
        but_first: let its first thread, and the processes which that starts, be.
    """
    if not GIVEN:
        return
    rest = GIVEN.difference(bound) or GIVEN
    for thread in _threads(pid, but_first):
        with contextlib.suppress(OSError):  # it has just ended
            os.sched_setaffinity(thread, rest)


def step_back(pid: int, *, but_first: bool = False) -> None:
    """Let this process, and those it starts, run before another one's threads.

    Args:
        pid: the other process.
        but_first: let its first thread, and the processes which that starts, be.
    """
    niceness = min(NICEST, os.getpriority(os.PRIO_PROCESS, 0) + STEP_BACK)
    for thread in _threads(pid, but_first):
        with contextlib.suppress(OSError):  # it has just ended
            os.setpriority(os.PRIO_PROCESS, thread, niceness)


def _threads(pid: int, but_first: bool) -> Iterator[int]:
    """Ids of a process's threads, where the system names them; none when it has ended."""
    with contextlib.suppress(OSError):
        threads = [int(thread.name) for thread in Path(f"/proc/{pid}/task").iterdir()]
        yield from (thread for thread in threads if not (but_first and thread == pid))
