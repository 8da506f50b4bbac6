"""Mixtures of experts: `quantserve_kernels.experts` beside vLLM's bf16 experts and a loop over experts in torch bf16.

    python -m benchmarks.kernels.experts [--threads 2] [--batches 1,4,16,64] [--hidden 1024] [--width 1024]

Everyone alternates call by call, in one process, on routes that differ from call to call, so that experts come from
memory. Reported are medians, and medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from benchmarks.console import BenchError, say
from benchmarks.decode.__main__ import numbers
from benchmarks.decode.pool import choose_cores
from benchmarks.kernels.formats import FORMATS
from benchmarks.kernels.peers import Missing, Vllm
from benchmarks.report import machine, machine_line, markdown_table
from quantserve_kernels import PackedWeight, experts, instruction_set

Route = tuple[Tensor, Tensor, Tensor]  # x, ids, weights
Layer = Callable[[Route], Tensor]
FORMATS_HERE = ("awq", "squeezellm-4")
VLLM, TORCH = "vLLM bf16", "torch bf16 loop"
ROUTES = 16
AGREE = 0.02  # largest relative difference between layers of the same weights


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.experts", description=(__doc__ or "").partition("\n")[0]
    )
    out.add_argument("--threads", type=int, default=1, help="compute threads; default 1")
    out.add_argument("--batches", type=numbers, default=(1, 4, 16, 64), help="default 1,4,16,64")
    out.add_argument("--hidden", type=int, default=1024, help="features of a token; default 1024")
    out.add_argument("--width", type=int, default=1024, help="features between the products; default 1024")
    out.add_argument("--experts", type=int, default=64, help="of the layer; default 64")
    out.add_argument("--choices", type=int, default=8, help="experts of a token; default 8")
    out.add_argument("--rounds", type=int, default=24, help="default 24")
    return out


def layers(options: argparse.Namespace) -> dict[str, Layer]:
    """Everyone by name; the bf16 ones have the weights of the first format.

    Raises:
        BenchError: this vLLM has no experts on CPUs.
    """
    count, hidden, width = options.experts, options.hidden, options.width
    packed = {
        name: (FORMATS[name].make(count * 2 * width, hidden), FORMATS[name].make(count * hidden, width))
        for name in FORMATS_HERE
    }
    dense = [weight.dequantize().bfloat16().view(count, -1, weight.k) for weight in packed[FORMATS_HERE[0]]]
    out = {name: own(*weights) for name, weights in packed.items()}
    return {**out, VLLM: vllm(*dense), TORCH: loop(*dense)}


def own(w13: PackedWeight, w2: PackedWeight) -> Layer:
    """Our operator."""
    return lambda route: experts(route[0], w13, w2, route[1], route[2])


def vllm(w13: Tensor, w2: Tensor) -> Layer:
    """vLLM's kernel for unquantized experts on CPUs without AMX."""
    try:
        Vllm()
    except Missing as error:
        raise BenchError(f"no experts to compare with: {error}") from error
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

    ready = [cpu_prepack_moe_weight(weight, "vec") for weight in (w13, w2)]

    def call(route: Route) -> Tensor:
        x, ids, weights = route
        out = torch.empty_like(x)
        cpu_fused_moe(out, x, *ready, None, None, weights, ids, "silu", "vec", False)
        return out

    return call


def loop(w13: Tensor, w2: Tensor) -> Layer:
    """One expert after the other."""

    def call(route: Route) -> Tensor:
        x, ids, weights = route
        out = torch.zeros(x.shape)
        for expert in ids.unique().tolist():
            token, choice = (ids == expert).nonzero(as_tuple=True)
            gate, up = linear(x[token], w13[expert]).chunk(2, -1)
            y = linear(silu(gate) * up, w2[expert])
            out.index_add_(0, token, y * weights[token, choice, None])
        return out.to(x.dtype)

    return call


def routes(options: argparse.Namespace, batch: int) -> list[Route]:
    """Tokens with different experts each."""
    g = torch.Generator().manual_seed(batch)

    def route() -> Route:
        ids = torch.stack([torch.randperm(options.experts, generator=g)[: options.choices] for _ in range(batch)])
        x = torch.randn(batch, options.hidden, generator=g).bfloat16()
        return x, ids.int(), torch.rand(batch, options.choices, generator=g)

    return [route() for _ in range(ROUTES)]


def measure(everyone: dict[str, Layer], here: list[Route], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, by name.

    Raises:
        BenchError: layers of the same weights give different results.
    """
    answers = {name: layer(here[0]).double() for name, layer in everyone.items()}
    for name in (VLLM, TORCH):
        difference = float((answers[name] - answers[FORMATS_HERE[0]]).norm() / answers[name].norm())
        if not difference < AGREE:
            raise BenchError(f"{name} and ours differ by {difference:.1%} on the same weights")
    taken: dict[str, list[float]] = {name: [] for name in everyone}
    for i in range(rounds):
        for place, (name, layer) in enumerate(everyone.items()):
            route = here[(i + place * ROUTES // len(everyone)) % ROUTES]
            began = time.perf_counter()
            layer(route)
            taken[name].append(time.perf_counter() - began)
    return taken


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a table; returns an exit code."""
    options = parser().parse_args(arguments)
    try:
        os.sched_setaffinity(0, choose_cores(options.threads))
        torch.set_num_threads(options.threads)
        everyone = layers(options)
        rows = []
        for batch in options.batches:
            taken = measure(everyone, routes(options, batch), options.rounds)
            rows.append([str(batch), *(f"{1e3 * statistics.median(taken[name]):.3g}" for name in everyone)])
            for name in FORMATS_HERE:
                for other in (VLLM, TORCH):
                    ratios = [theirs / ours for ours, theirs in zip(taken[name], taken[other], strict=True)]
                    rows[-1].append(f"{statistics.median(ratios):.2f}x")
    except BenchError as error:
        say(f"error: {error}")
        return 1
    over = [f"{name} over {other}" for name in FORMATS_HERE for other in (VLLM, TORCH)]
    say(f"{machine_line(machine())}; {datetime.date.today().isoformat()}; {instruction_set()}")
    say(
        f"{options.choices} of {options.experts} experts, hidden {options.hidden}, width {options.width}, "
        f"{options.threads} threads; times in ms\n"
    )
    say(markdown_table(["batch", *everyone, *over], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
