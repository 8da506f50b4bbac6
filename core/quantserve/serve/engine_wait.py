"""How vLLM's processes wait for each other on a CPU; loaded by vLLM as a general plugin.

vLLM's engine core and its workers spin with ``sched_yield`` while they wait for each other, and for a second after the
last step. On Linux 6.18 such a process can keep another one on the same core, such as the one that sends the tokens on,
from running for all that second, and with two of them for ten and more. Sleeping instead would tell them of each step's
end some 60 microseconds late, a twentieth of a small model's step; sleeping now and then gives the core away as well.

A worker that waits for requests does not rest either: it has a dozen process groups, and for each of them a thread of
gloo's that looks around a hundred times a second. They need no more than one between them.
"""

from __future__ import annotations

import datetime
import functools
import os
import time
from typing import Any, Final

from quantserve.serve.engine_imports import collect_as_usual

REST_EVERY: Final = 1000
"""Turns of the waiting loop, of a microsecond or so each."""


class Waiting:
    """One turn of a loop that waits."""

    def __init__(self) -> None:
        self._turns = 0

    def __call__(self) -> None:
        """Yield the CPU, and now and then sleep for as short as the system can."""
        self._turns += 1
        if self._turns % REST_EVERY:
            os.sched_yield()
        else:
            time.sleep(0)


def share_gloo_device() -> None:
    """Let all gloo process groups of this process use one device, with one thread, instead of one each.

    Which devices there are is left to torch where ``GLOO_SOCKET_IFNAME`` names them.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    from torch.distributed import ProcessGroupGloo

    plain = ProcessGroupGloo.__init__
    device = functools.cache(ProcessGroupGloo.create_default_device)

    def start(group: ProcessGroupGloo, *where: Any, timeout: datetime.timedelta | None = None) -> None:
        if timeout is not None:  # the caller leaves the other options to torch
            options = ProcessGroupGloo._Options()
            options._devices, options._timeout = [device()], timeout
            where = (*where, options)
        plain(group, *where)

    ProcessGroupGloo.__init__ = start


def register() -> None:
    """Let the engine core and its workers rest while they wait; what they import is imported."""
    collect_as_usual()
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.sched_yield = Waiting()
    share_gloo_device()
