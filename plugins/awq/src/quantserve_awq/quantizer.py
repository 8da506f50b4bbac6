"""The quantizer of AWQ (arXiv 2306.00978): scales for the inputs that matter, clipped groups, rounding to nearest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantserve.api import Checkpoint, Linear, refuses_float16
from quantserve_awq._folds import Fold, Trial, folds
from quantserve_awq._format import BITS, PER_WORD, Rounded, dequantize_linear, grouped, rounded
from quantserve_awq._refine import refined
from quantserve_quantize import Block, Need, Quantized, Quantizer, Statistics, option, unquantized
from quantserve_quantize.hessian import steadied

GROUPS = (128, 64, 32)
"""Group sizes that vLLM's fast kernels take, beside -1."""
ALPHAS = tuple(step / 20 for step in range(21))
ROWS = 1024
"""Output channels, evenly spaced, that are enough to choose one number."""
SHRINK = tuple(1 - step / 20 for step in range(11))
"""Shares of a group's bounds that clipping tries."""


@dataclass(frozen=True)
class AwqOptions:
    """Options of `quantserve quantize --method awq`."""

    group_size: int = option(
        128, "Inputs that share a scale and a zero point; -1 for all of them.", choices=(32, 64, 128, -1)
    )
    scales: str = option(
        "search",
        "Scales of the inputs, folded into the operation before: search by their mean magnitude, or none.",
        choices=("search", "none"),
    )
    clip: bool = option(True, "Clip each group where that lowers the error of the output.")
    refine: bool = option(True, "Let codes make up for each other's errors, as GPTQ does; the paper rounds to nearest.")


class Awq(Quantizer):
    """See the module."""

    Options = AwqOptions
    options: AwqOptions
    experts = True
    dtype: str

    def __init__(self, options: AwqOptions) -> None:
        super().__init__(options)
        self.needs = frozenset({Need.HESSIAN} if options.scales == "search" or options.clip or options.refine else ())
        self.dtype = "float16"
        self.fix = ""
        self.kept: list[str] = []

    def begin(self, checkpoint: Checkpoint, linears: Sequence[Linear]) -> None:
        """Take the dtype that vLLM runs the model in, and note what stays unquantized and which group sizes fit."""
        self.kept = [name for name in unquantized(checkpoint, linears) if not name.endswith("lm_head")]
        self.dtype = "bfloat16" if refuses_float16(checkpoint) else "float16"
        fitting = [str(group) for group in GROUPS if not any(linear.k % group for linear in linears)] or ["-1"]
        self.fix = f"give --group-size {' or '.join(fitting)}, which works for all {len(linears)} linears"

    def refusal(self, linear: Linear) -> str:
        """K has to be whole groups, and N whole words."""
        if linear.n % PER_WORD:
            return f"N is {linear.n}, not a multiple of the {PER_WORD} codes in a word\n  fix: use another method"
        if linear.k % (linear.k if self.options.group_size == -1 else self.options.group_size):
            return f"K is {linear.k}, not a multiple of the group size {self.options.group_size}\n  fix: {self.fix}"
        return ""

    def prepare(self, block: Block) -> None:
        """Scale the inputs of linears, and fold the inverse into what comes before them."""
        if self.options.scales == "none":
            return
        trial = Trial(block)
        found = list(folds(block, trial))
        means = _mean_magnitudes(block, [next(iter(fold.linears)) for fold in found])
        for fold, mean in zip(found, means, strict=True):
            scales = self._best_scales(block, fold, mean)
            if trial.keeps(fold, scales, self._torch_dtype):
                _rescale(block, fold, fold.apply(scales, self._torch_dtype))

    def quantize(self, linear: Linear, weight: Tensor, statistics: Statistics) -> Quantized:
        """Clip, round, and refine."""
        made = self._rounded(weight, statistics.hessian if self.options.clip else None)
        if statistics.hessian is not None and self.options.refine:
            hessian = steadied(statistics.hessian, statistics.tokens)
            made = refined(weight, made, hessian)
        tensors = made.packed(self._torch_dtype)._asdict()
        return Quantized(tensors, self.dequantize(tensors, {}))

    @classmethod
    def dequantize(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
        """(code - zero point) x scale."""
        return dequantize_linear(**tensors)

    def quantization_config(self, made: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """As AutoAWQ writes it."""
        config: dict[str, Any] = {
            "quant_method": "awq",
            "bits": BITS,
            "group_size": self.options.group_size,
            "zero_point": True,
            "version": "gemm",
        }
        return config | {"modules_to_not_convert": self.kept} if self.kept else config

    @property
    def _torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def _rounded(self, weight: Tensor, hessian: Tensor | None) -> Rounded:
        groups, low, high = grouped(weight, self.options.group_size)
        if hessian is not None:
            low, high = self._clipped(groups, low, high, hessian)
        return rounded(groups, low, high, self._torch_dtype)

    def _clipped(self, groups: Tensor, low: Tensor, high: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
        """The bounds of each group with the least error of the group's part of the output."""
        count, size = groups.shape[1:]
        blocks = torch.stack([hessian[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)])

        def error(low: Tensor, high: Tensor) -> Tensor:
            found = rounded(groups, low, high, self._torch_dtype)
            wrong = ((found.codes - found.zeros) * found.scales - groups).transpose(0, 1)
            return ((wrong @ blocks) * wrong).sum(-1).T[..., None]

        below, above, least = low, high, error(low, high)
        # Both bounds together, then each by itself.
        for low_moves, high_moves in ((True, True), (True, False), (False, True)):
            fixed_low, fixed_high = below, above
            for share in SHRINK:
                tried_low = low * share if low_moves else fixed_low
                tried_high = high * share if high_moves else fixed_high
                found = error(tried_low, tried_high)
                better = found < least
                below, above = torch.where(better, tried_low, below), torch.where(better, tried_high, above)
                least = torch.minimum(least, found)
        return below, above

    def _best_scales(self, block: Block, fold: Fold, mean: Tensor) -> Tensor:
        """The power of the inputs' magnitudes [k] with which rounding costs least output error."""
        quantized = [path for path in fold.linears if path in block.linears]
        hessian = block.statistics[quantized[0]].hessian
        assert hessian is not None
        weight = torch.cat([fold.linears[path].weight.data for path in quantized])
        weight = weight[:: max(1, len(weight) // ROWS)]
        least, best = float("inf"), torch.ones_like(mean)
        for alpha in ALPHAS:
            scales = mean.clamp_min(1e-4) ** alpha
            scales = fold.fitting(scales / (scales.max() * scales.min()).sqrt())
            wrong = self._rounded(weight * scales, None).weight() / scales - weight
            error = float(((wrong @ hessian) * wrong).sum())
            if error < least:
                least, best = error, scales
        return best


def _rescale(block: Block, fold: Fold, scales: Tensor) -> None:
    """Divide the measured inputs of a fold's linears by the scales [k]."""
    for path in fold.linears:
        if (statistics := block.statistics.get(path)) and statistics.hessian is not None:
            statistics.hessian = statistics.hessian / scales / scales[:, None]
            statistics.squares = statistics.hessian.diagonal().clone()


def _mean_magnitudes(block: Block, paths: Sequence[str]) -> list[Tensor]:
    """The mean of abs(x) for the input of each linear, float32 [k]."""
    sums: dict[str, Tensor] = {}
    handles = []
    for path in paths:

        def note(module: Any, inputs: tuple[Tensor, ...], path: str = path) -> None:
            total = inputs[0].abs().reshape(-1, inputs[0].shape[-1]).sum(0)
            sums[path] = sums[path] + total if path in sums else total

        handles.append(block.module_of(path).register_forward_pre_hook(note))
    for hidden in block.inputs:
        block.run(hidden)
    for handle in handles:
        handle.remove()
    tokens = sum(len(hidden) for hidden in block.inputs)
    return [sums[path] / tokens for path in paths]
