"""vLLM's processes give their CPU away while they wait for each other, and sleep while they wait for requests."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import sys
import time
from datetime import timedelta
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from quantserve.plugins.registry import ENGINE_PLUGIN
from quantserve.serve.replica.vllm.engine_wait import SLEEP_EVERY


def _waits(found: multiprocessing.Queue[tuple[tuple[int, int], ...]]) -> None:
    """Turns of vLLM's loop in which this process waited for a message, and how often it slept meanwhile."""
    from vllm.distributed.device_communicators import shm_broadcast

    (plugin,) = entry_points(group="vllm.general_plugins", name=ENGINE_PLUGIN)
    register = plugin.load()
    register()
    register()  # vLLM loads plugins in every process, some of them twice
    writer = shm_broadcast.MessageQueue(n_reader=1, n_local_reader=1, max_chunk_bytes=1 << 16, max_chunks=1)
    reader = shm_broadcast.MessageQueue.create_from_handle(writer.export_handle(), 0)
    turn = shm_broadcast.sched_yield
    counts = []
    for wait in (lambda: reader.dequeue(timeout=0.01), lambda: writer.enqueue("no room", timeout=0.01)):
        before = turn._turns, resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        deadline = time.monotonic() + 30
        while turn._turns < before[0] + 5000 and time.monotonic() < deadline:
            writer.enqueue("message", timeout=30)
            reader.dequeue(timeout=30)  # the loop spins for a second after a message
            if counts:
                writer.enqueue("fills the buffer", timeout=30)
            with contextlib.suppress(TimeoutError):
                wait()
            if counts:
                reader.dequeue(timeout=30)
        counts.append((turn._turns - before[0], resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before[1]))
    found.put(tuple(counts))


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["EngineCore_DP1", "VllmWorker-0"])
def test_the_loops_of_vllms_message_queue_sleep_every_thousandth_turn(name: str) -> None:
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue[tuple[tuple[int, int], ...]] = context.Queue()
    process = context.Process(target=_waits, args=(found,), name=name)
    process.start()
    try:
        for turns, sleeps in found.get(timeout=180):
            assert turns >= 5000
            assert sleeps >= turns // SLEEP_EVERY
    finally:
        process.join(120)


def _gloo(rank: int, init_file: str, interface: str, found: multiprocessing.Queue[tuple[int, float, float]]) -> None:
    """Threads of gloo's after nine process groups of two ranks, what they sum up to, and a group's timeout."""
    import torch
    from torch import distributed

    from quantserve.serve.replica.vllm.engine_plugins import register

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
            rank.join(120)
            rank.kill()
