"""The linears one by one: every contender at every shape and batch, beside cuBLAS."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.console import BenchError, say
from benchmarks.gpu import device
from benchmarks.gpu.formats import CUBLAS
from benchmarks.gpu.state import State
from benchmarks.gpu.weights import Dense, Weight, clone, make, multiply, normal
from benchmarks.kernels.results import seconds, speedup
from benchmarks.kernels.shapes import Shape

CACHES = 3  # times the L2 cache that the copies of a weight exceed
CALLS = 32  # in a graph at least, so that what its start takes does not count
CHECKED = (1, 16, 128)  # batches at which results are compared
WORST = 0.01  # relative error that is still right: W and the result are rounded to bfloat16


def measure(
    state: State, shapes: Sequence[Shape], batches: Sequence[int], formats: Sequence[str], rounds: int, where: str
) -> None:
    """All cells, shape by shape, into `cells` and `errors` of the results.

    Raises:
        OutOfTimeError: what was measured is in the results.
        BenchError: a product is wrong.
    """
    cache = device.cache_bytes()
    for shape in shapes:
        copies: dict[str, list[Weight]] = {}
        for name in (CUBLAS, *formats):
            state.check_time()
            made = state.attempt(f"{shape}: {name}", prepare, state, name, shape, cache, where)
            if made is not None:
                copies[name] = made
        for batch in batches:
            state.check_time()
            cell = measure_cell(state, shape, batch, copies, rounds, where)
            state.found["cells"].append(cell)
            state.save()
            say(progress(shape, cell))
        copies.clear()
        device.free()


def prepare(state: State, name: str, shape: Shape, cache: int, where: str) -> list[Weight]:
    """Copies of a checked weight that together exceed the cache.

    Raises:
        BenchError: its product is wrong.
    """
    weight, dense = make(name, shape, where)
    for error in errors(weight, dense, shape, where):
        state.found["errors"].append({"format": name, "shape": dataclasses.asdict(shape), **error})
        if not error["error"] <= WORST:
            state.save()
            raise BenchError(
                f"{name}, {shape}, batch {error['batch']}: the product is {error['error']:.2%} off, at most "
                f"{WORST:.0%} is right; finished cells are in {state.path.name}, --render draws them"
            )
    count = max(2, CACHES * cache // weight.nbytes + 1)
    return [weight, *(clone(weight) for _ in range(count - 1))]


def errors(weight: Weight, dense: Dense, shape: Shape, where: str) -> list[dict[str, Any]]:
    """The norm of the error over the norm, against float32 (no TF32), at some batches."""
    torch.set_float32_matmul_precision("highest")
    exact = dense()
    out = []
    for batch in CHECKED:
        x = normal(batch, shape.k, device=where, seed=batch)
        truth = x.float() @ exact.T
        error = float((multiply(x, weight).float() - truth).norm() / truth.norm())
        out.append({"batch": batch, "error": error})
    return out


def measure_cell(
    state: State, shape: Shape, batch: int, copies: Mapping[str, Sequence[Weight]], rounds: int, where: str
) -> dict[str, Any]:
    """All contenders at one shape and batch."""
    x = normal(batch, shape.k, device=where)
    replays = {}
    for name, weights in copies.items():
        calls = [partial(multiply, x, weight) for weight in weights] * -(-CALLS // len(weights))
        replay = state.attempt(f"{shape}, batch {batch}: {name}", device.capture, calls)
        if replay is not None:
            replays[name] = replay
    return {
        "shape": dataclasses.asdict(shape),
        "batch": batch,
        "seconds": device.times(replays, rounds),
        "bytes": {name: copies[name][0].nbytes for name in replays},
    }


def progress(shape: Shape, cell: Mapping[str, Any]) -> str:
    """One line about a cell."""
    names = [name for name in cell["seconds"] if name != CUBLAS]
    ratios = {name: speedup(cell, name, CUBLAS) for name in names}
    own = f"{CUBLAS} {1e6 * seconds(cell, CUBLAS):.1f} µs" if CUBLAS in cell["seconds"] else f"no {CUBLAS}"
    said = [f"{name} {ratio:.2f}x" for name, ratio in ratios.items() if ratio is not None]
    return f"{shape}, batch {cell['batch']}: {', '.join([own, *said])}"
