"""vLLM's processes give their CPU away while they wait for each other."""

from __future__ import annotations

import multiprocessing
import resource
import time
from importlib.metadata import entry_points

import pytest

from quantserve.plan import OWN_ENGINE_PLUGIN


def _rests(found: multiprocessing.Queue[int]) -> None:
    """How often a process sleeps while it waits for a fifth of a second."""
    from vllm.distributed.device_communicators import shm_broadcast

    (plugin,) = entry_points(group="vllm.general_plugins", name=OWN_ENGINE_PLUGIN)
    register = plugin.load()
    register()
    register()  # vLLM loads plugins in every process, some of them twice
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
    deadline = time.monotonic() + 0.2
    while time.monotonic() < deadline:
        shm_broadcast.sched_yield()
    found.put(resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before)


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["EngineCore_DP1", "VllmWorker-0"])
def test_mostly_it_spins_and_now_and_then_it_rests(name: str) -> None:
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue[int] = context.Queue()
    process = context.Process(target=_rests, args=(found,), name=name)
    process.start()
    try:
        assert 5 < found.get(timeout=120) < 1000
    finally:
        process.join(30)
