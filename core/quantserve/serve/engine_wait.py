"""How vLLM's engine waits for its worker on a CPU; loaded by vLLM as a general plugin.

vLLM's engine core and its worker are two processes, and the core spins with ``sched_yield`` until the worker has
finished a step. On Linux 6.18 and few cores this can keep another process on the same core, such as the one that sends
the tokens on, from running for ten seconds and more. Sleeping for a moment instead (vLLM's own way for older Pythons)
gives the core away; a step then ends some 50 microseconds later.
"""

from __future__ import annotations

import multiprocessing

ENGINE_CORE = "EngineCore"
"""How the name of the engine core's process begins."""


def register() -> None:
    """Let the engine core sleep while it waits. Workers, which have a core of their own, go on spinning."""
    if multiprocessing.current_process().name.startswith(ENGINE_CORE):
        from vllm.distributed import utils

        utils.USE_SCHED_YIELD = False
