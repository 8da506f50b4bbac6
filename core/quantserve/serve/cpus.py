"""Keeps other processes off the CPUs of an engine.

vLLM binds its computing threads to all cores but a few. Another process on such a core delays a thread, and with it the
whole step, for which all requests wait. On the remaining cores the engine core waits for the end of a step to begin the
next one; delaying it costs as much.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Set
from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]

STEP_BACK: Final = 10
"""Niceness added to background processes: a tenth of the CPU time when an engine competes for it."""
NICEST: Final = 19
"""Lowest priority of the system."""
GIVEN: Final = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()
"""The CPUs that this process was started with."""


def leave_to_workers(reserved: int = 0) -> set[int]:
    """Keep this process and its descendants off the CPUs to which worker processes among them are bound.

    If no process is bound, several engines share all CPUs; then only this process is kept off.

    Args:
        reserved: number of CPUs that unbound workers leave free.

    Returns:
        The workers' CPUs; empty if no CPU would be left for this process.
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
    """Restrict a process to the CPUs in `GIVEN` without `bound`; no restriction if none would be left.

    Args:
        pid: the process.
        bound: CPUs to avoid.
        but_first: do not change its first thread, whose child processes inherit the mask.
    """
    if not GIVEN:
        return
    rest = GIVEN.difference(bound) or GIVEN
    for thread in _threads(pid, but_first):
        with contextlib.suppress(OSError):  # it has just ended
            os.sched_setaffinity(thread, rest)


def step_back(pid: int, *, but_first: bool = False) -> None:
    """Give another process a lower priority than this one.

    Args:
        pid: the other process.
        but_first: do not change its first thread, whose child processes inherit the priority.
    """
    niceness = min(NICEST, os.getpriority(os.PRIO_PROCESS, 0) + STEP_BACK)
    for thread in _threads(pid, but_first):
        with contextlib.suppress(OSError):  # it has just ended
            os.setpriority(os.PRIO_PROCESS, thread, niceness)


def _threads(pid: int, but_first: bool) -> Iterator[int]:
    """Thread ids of a process, if the system lists them; none if it has ended."""
    with contextlib.suppress(OSError):
        threads = [int(thread.name) for thread in Path(f"/proc/{pid}/task").iterdir()]
        yield from (thread for thread in threads if not (but_first and thread == pid))
