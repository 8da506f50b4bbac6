"""The k-means of SqueezeLLM's quantizer against scikit-learn's with 10 restarts: time and weighted error.

scikit-learn clusters a few rows, and its time is multiplied. It is needed beside quantserve:
`pip install scikit-learn`, best in an environment of its own.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.console import BenchError
from quantserve.api import Linear
from quantserve_quantize import Statistics
from quantserve_squeezellm.quantizer import SqueezeLLM, SqueezeLLMOptions

RESTARTS = 10


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(prog="python -m benchmarks.kmeans", description=(__doc__ or "").partition("\n")[0])
    out.add_argument("--size", type=int, default=4096, help="of the square weight; default 4096")
    out.add_argument("--rows", type=int, default=16, help="for scikit-learn; default 16")
    out.add_argument("--bits", type=int, choices=(3, 4), default=4, help="default 4")
    return out


def data(size: int) -> tuple[Tensor, Tensor]:
    """A weight with heavy tails and costs that differ by channel and input, float32 [size, size] each."""
    g = torch.Generator().manual_seed(0)
    shape = (size, size)
    weight = torch.randn(shape, generator=g) / torch.randn(shape, generator=g).abs().add(0.5)
    return weight, torch.randn(shape, generator=g) ** 2 * torch.rand(1, size, generator=g)


def scikit_learn(weight: Tensor, cost: Tensor, clusters: int) -> tuple[float, Tensor]:
    """Seconds, and the weighted error [n] of each row.

    Raises:
        BenchError: it is not installed.
    """
    try:
        found = importlib.import_module("sklearn.cluster")
    except ImportError as error:
        raise BenchError("scikit-learn is not installed\n  fix: pip install scikit-learn") from error
    began, errors = time.monotonic(), []
    for values, weights in zip(weight.double().numpy(), cost.double().numpy(), strict=True):
        fitted = found.KMeans(clusters, n_init=RESTARTS, random_state=0).fit(values[:, None], sample_weight=weights)
        errors.append(fitted.inertia_)
    return time.monotonic() - began, torch.tensor(errors, dtype=torch.float64)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    weight, cost = data(options.size)
    few = slice(0, min(options.rows, options.size))
    try:
        theirs, least = scikit_learn(weight[few], cost[few], 2**options.bits)
    except BenchError as error:
        print(f"benchmarks.kmeans: {error}", file=sys.stderr)
        return 1
    theirs *= options.size / len(least)
    linear = Linear("model.layers.0.mlp.up_proj", options.size, options.size, "column")
    began = time.monotonic()
    made = SqueezeLLM(SqueezeLLMOptions(bits=options.bits)).quantize(linear, weight, Statistics(gradients=cost))
    ours = time.monotonic() - began
    ratio = (cost[few] * (weight[few] - made.weight[few]) ** 2).double().sum(1) / least
    print(
        f"{options.size} x {options.size}, {2**options.bits} clusters: {ours:.1f} s, packing included; scikit-learn "
        f"{theirs:.0f} s ({len(least)} rows extrapolated), {theirs / ours:.0f} times as long; weighted error over "
        f"scikit-learn's: mean {ratio.mean():.4f}, worst row {ratio.max():.4f}\n{report.machine_line(report.machine())}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
