"""The engine core sleeps while it waits, and nothing else changes."""

from __future__ import annotations

import multiprocessing
from importlib.metadata import entry_points

import pytest

from quantserve.plan import OWN_ENGINE_PLUGIN


def _says(found: multiprocessing.Queue[bool]) -> None:
    from vllm.distributed import utils

    (plugin,) = entry_points(group="vllm.general_plugins", name=OWN_ENGINE_PLUGIN)
    register = plugin.load()
    register()
    register()  # vLLM loads plugins in every process, some of them twice
    found.put(bool(utils.USE_SCHED_YIELD))


@pytest.mark.vllm
@pytest.mark.parametrize(("name", "spins"), [("EngineCore", False), ("EngineCore_DP1", False), ("VllmWorker-0", True)])
def test_only_the_engine_core_sleeps(name: str, spins: bool) -> None:
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue[bool] = context.Queue()
    process = context.Process(target=_says, args=(found,), name=name)
    process.start()
    try:
        assert found.get(timeout=120) is spins
    finally:
        process.join(30)
