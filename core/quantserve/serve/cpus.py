"""Keeping other processes out of an engine's way.

vLLM binds the threads that compute on a CPU to all cores but a few. A process of ours that runs on one of these cores
stops a thread, and with it the step that all requests wait for. On the other cores the engine core waits for a step's
end to begin the next one, and what keeps it from that is as bad.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]

STEP_BACK: Final = 10
"""How much nicer than we are is what is not in a hurry: a tenth of the time where both want it, and when we yield."""
NICEST: Final = 19


def leave_to_workers() -> set[int]:
    """Keep this process and those it started off the CPUs that some of the latter are bound to.

    Returns:
        Those CPUs; none where nothing is bound, or no CPU would be left.
    """
    if not hasattr(os, "sched_getaffinity"):
        return set()
    allowed = os.sched_getaffinity(0)
    masks: dict[int, set[int]] = {os.getpid(): allowed}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            masks[process.pid] = set(process.cpu_affinity())
    bound = {cpu for mask in masks.values() if mask < allowed for cpu in mask}
    if allowed <= bound:
        return set()
    for pid, mask in masks.items():
        if mask == allowed:
            keep_off(pid, bound)
    return bound


def keep_off(pid: int, bound: Collection[int]) -> None:
    """Let a process's threads run on all CPUs that this process may use except `bound`; on all when none is left."""
    if not hasattr(os, "sched_setaffinity"):
        return
    allowed = os.sched_getaffinity(0)
    rest = allowed.difference(bound) or allowed
    for thread in _threads(pid):
        with contextlib.suppress(OSError):  # it has just ended
            os.sched_setaffinity(thread, rest)


def step_back(pid: int, *, but_first: bool = False) -> None:
    """Let this process, and those it starts, run before another one's threads.

    Args:
        pid: the other process.
        but_first: leave its first thread, and the processes which that starts, as they are.
    """
    niceness = min(NICEST, os.getpriority(os.PRIO_PROCESS, 0) + STEP_BACK)
    for thread in _threads(pid):
        if not (but_first and thread == pid):
            with contextlib.suppress(OSError):  # it has just ended
                os.setpriority(os.PRIO_PROCESS, thread, niceness)


def _threads(pid: int) -> Iterator[int]:
    """Ids of a process's threads, where the system names them; none when it has ended."""
    with contextlib.suppress(OSError):
        yield from [int(thread.name) for thread in Path(f"/proc/{pid}/task").iterdir()]
