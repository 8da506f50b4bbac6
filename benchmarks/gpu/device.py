"""CUDA graphs and the time they take. All of it works on the current stream, which must not be the default one."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from benchmarks.console import BenchError

DEVICE = "cuda"
COPIED = 1 << 30  # bytes


@dataclass(frozen=True)
class Replay:
    """What is timed as a whole.

    Attributes:
        run: starts it on the current stream.
        calls: it consists of; held here because a graph does not keep the tensors that it works on.
    """

    run: Callable[[], object]
    calls: Sequence[Callable[[], object]]


def own_stream() -> AbstractContextManager[None]:
    """Work on a stream of our own.

    Raises:
        BenchError: torch sees no NVIDIA GPU.
    """
    if torch.version.hip is not None or not torch.cuda.is_available():
        raise BenchError(
            "no NVIDIA GPU on this machine\n"
            "  fix: run it where nvidia-smi lists one and torch is a CUDA build; --render draws an older results.json"
        )
    return torch.cuda.stream(torch.cuda.Stream())


def cache_bytes() -> int:
    """The size of the L2 cache."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def capture(calls: Sequence[Callable[[], object]]) -> Replay:
    """One CUDA graph of all calls in turn. The first is made once before, so that nothing is compiled meanwhile."""
    calls[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for call in calls:
            call()
    return Replay(graph.replay, calls)


def times(replays: Mapping[str, Replay], rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Seconds of a call of each in every round; the order changes from round to round.

    The GPU is never waited for in between, so it always has work queued and the host's time to start a graph is hidden.

    Args:
        replays: by name; each is run once before.
        rounds: how many times each is timed.
        repeats: runs that are timed as one.
    """
    for replay in replays.values():
        replay.run()
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in replays}
    order = list(replays)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            for _ in range(repeats):
                replays[name].run()
            ended.record()
            marks[name].append((began, ended))
    torch.cuda.synchronize()
    return {
        name: [began.elapsed_time(ended) / 1e3 / repeats / len(replays[name].calls) for began, ended in pairs]
        for name, pairs in marks.items()
    }


def copy_speed() -> float:
    """Bytes per second, read plus written, of a large copy within the device's memory."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    taken = times({"copy": Replay(copy, [copy])}, rounds=9)
    return 2 * COPIED / median(taken["copy"])


def free() -> None:
    """Give memory that nobody refers to back to the device."""
    torch.cuda.empty_cache()
