"""How vLLM's processes wait for each other on a CPU; loaded by vLLM as a general plugin.

vLLM's engine core and its workers spin with ``sched_yield`` while they wait for each other, and for a second after the
last step. On Linux 6.18 such a process can keep another one on the same core, such as the one that sends the tokens on,
from running for all that second, and with two of them for ten and more. Sleeping instead would tell them of each step's
end some 60 microseconds late, a twentieth of a small model's step; sleeping now and then gives the core away as well.

Where computing threads are not bound to cores of their own, because several models share them, a spinning engine core
would take a core from them: there it sleeps.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from typing import Final

ENGINE_CORE: Final = "EngineCore"
"""How the name of the engine core's process begins."""
REST_EVERY: Final = 1000
"""Turns of the waiting loop, of a microsecond or so each."""


class Waiting:
    """One turn of a loop that waits.

    Args:
        rest_every: in one of so many turns it sleeps for as short as the system can; in others it yields.
    """

    def __init__(self, rest_every: int) -> None:
        self._rest_every = rest_every
        self._turns = 0

    def __call__(self) -> None:
        """Give the CPU to whoever wants it."""
        self._turns += 1
        if self._turns % self._rest_every:
            os.sched_yield()
        else:
            time.sleep(0)


def register() -> None:
    """Let the engine core and its workers rest while they wait."""
    from vllm.distributed.device_communicators import shm_broadcast

    shared = os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == "nobind"
    core = multiprocessing.current_process().name.startswith(ENGINE_CORE)
    shm_broadcast.sched_yield = Waiting(1 if shared and core else REST_EVERY)
