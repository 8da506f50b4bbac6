"""Keeping other processes off the CPUs that an engine's threads are bound to.

vLLM binds the threads that compute on a CPU to all cores but a few. A process of ours that runs on one of these cores
stops a thread, and with it the step that all requests wait for.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

import psutil  # type: ignore[import-untyped]


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
    with contextlib.suppress(OSError):  # the process has just ended
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(thread.name), rest)
