"""Makes vLLM's processes on a CPU yield the core while they wait; two of `patches.PATCHES`.

vLLM's engine core and its workers spin with ``sched_yield`` while they wait for each other, and for a second after the
last step. On Linux 6.18 a spinning process can block another process on the same core, such as the one that sends the
tokens, for that whole second; two of them block it for ten seconds and more. Sleeping in every turn would delay each
step by some 60 microseconds, 5 % of a small model's step. Sleeping in every thousandth turn is enough.

An idle worker has a second cost: a dozen process groups, each with a thread of gloo that polls a hundred times a
second. One shared thread is enough.
"""

from __future__ import annotations

import datetime
import functools
import os
import time
from typing import Any, Final

SLEEP_EVERY: Final = 1000
"""Turns of the waiting loop, of about a microsecond each, between two sleeps."""


class Waiting:
    """One turn of a loop that waits."""

    def __init__(self) -> None:
        self._turns = 0

    def __call__(self) -> None:
        """Yield the CPU; in every `SLEEP_EVERY`-th turn sleep for the shortest time possible."""
        self._turns += 1
        if self._turns % SLEEP_EVERY:
            os.sched_yield()
        else:
            time.sleep(0)


def sleep_in_some_turns() -> None:
    """Replace the ``sched_yield`` of vLLM's loops that wait for messages by `Waiting`."""
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.sched_yield = Waiting()


def share_gloo_device() -> None:
    """Let all gloo process groups of this process use one device, with one thread, instead of one each.

    Does nothing if ``GLOO_SOCKET_IFNAME`` selects the devices.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    from torch.distributed import ProcessGroupGloo

    if not hasattr(ProcessGroupGloo._Options(), "_devices"):
        raise AttributeError("ProcessGroupGloo._Options has no _devices")
    plain = ProcessGroupGloo.__init__
    device = functools.cache(ProcessGroupGloo.create_default_device)

    def start(group: ProcessGroupGloo, *where: Any, timeout: datetime.timedelta | None = None) -> None:
        if timeout is not None:  # otherwise the caller passes all options itself
            options = ProcessGroupGloo._Options()
            options._devices, options._timeout = [device()], timeout
            where = (*where, options)
        plain(group, *where)

    ProcessGroupGloo.__init__ = start
