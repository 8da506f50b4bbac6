"""vLLM's processes give their CPU away while they wait for each other, and sleep while they wait for requests."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
from datetime import timedelta
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from quantserve.registry import ENGINE_PLUGIN


def _rests(found: multiprocessing.Queue[int]) -> None:
    """How often a process sleeps while it waits for a fifth of a second."""
    from vllm.distributed.device_communicators import shm_broadcast

    (plugin,) = entry_points(group="vllm.general_plugins", name=ENGINE_PLUGIN)
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
def test_it_spins_and_sleeps_every_thousandth_turn(name: str) -> None:
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue[int] = context.Queue()
    process = context.Process(target=_rests, args=(found,), name=name)
    process.start()
    try:
        assert 5 < found.get(timeout=120) < 1000
    finally:
        process.join(30)


def _gloo(rank: int, init_file: str, interface: str, found: multiprocessing.Queue[tuple[int, float, float]]) -> None:
    """Threads of gloo's after nine process groups of two ranks, what they sum up to, and a group's timeout."""
    import torch
    from torch import distributed

    from quantserve.serve.engine_plugins import register

    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    register()
    register()
    minute = timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2, timeout=minute)
    groups = [distributed.new_group([0, 1], backend="gloo", timeout=minute) for _ in range(8)]
    total = torch.ones(1)
    for group in groups:
        distributed.all_reduce(total, group=group)
    names = [(thread / "comm").read_text() for thread in Path("/proc/self/task").iterdir()]
    timeout = groups[0]._get_backend(torch.device("cpu")).options._timeout
    found.put((sum("gloo_tcp_loop" in name for name in names), total.item(), timeout.total_seconds()))
    distributed.barrier()  # the other one may still be counting
    distributed.destroy_process_group()


@pytest.mark.vllm
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads by name, which only Linux shows")
@pytest.mark.parametrize(("interface", "threads"), [("", 1), ("lo", 9)])
def test_the_process_groups_of_a_worker_share_a_thread_unless_the_user_names_interfaces(
    tmp_path: Path, interface: str, threads: int
) -> None:
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue[tuple[int, float, float]] = context.Queue()
    arguments = (str(tmp_path / "meet"), interface, found)
    ranks = [context.Process(target=_gloo, args=(rank, *arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        assert [found.get(timeout=120) for _ in ranks] == [(threads, 2.0**8, 60.0)] * 2
    finally:
        for rank in ranks:
            rank.join(30)
            rank.kill()
