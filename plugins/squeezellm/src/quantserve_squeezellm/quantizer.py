"""The quantizer of SqueezeLLM (arXiv 2306.07629): a codebook per output channel by weighted k-means, and outliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantserve.api import Linear
from quantserve_kernels import pack_stream
from quantserve_quantize import Need, Quantized, Quantizer, Statistics, option
from quantserve_quantize.hessian import steadied
from quantserve_squeezellm._kmeans import CANDIDATES, codebooks, encode
from quantserve_squeezellm._packing import dequantize, quantization_config, to_csr
from quantserve_squeezellm._refine import refined

CHUNK = 4_000_000
"""Weights, or pairs of candidates for borders, clustered at once: some hundred MB of working copies."""


@dataclass(frozen=True)
class SqueezeLLMOptions:
    """Options of `quantserve quantize --method squeezellm`."""

    bits: int = option(4, "Bits of a code.", choices=(3, 4))
    sparsity: float = option(
        0.0, "Percent of each weight kept exactly in a sparse part; 0.45 is usual.", low=0, high=50
    )
    sensitive: float = option(
        0.05,
        "Percent that --sparsity takes by sensitivity, the rest by magnitude; needs --sensitivity gradients.",
        low=0,
        high=50,
    )
    sensitivity: str = option(
        "gradients",
        "Weights of the k-means: squared gradients of the loss (the whole model in float32, twice), mean squared "
        "inputs (one block in memory), or none (no calibration).",
        choices=("gradients", "inputs", "none"),
    )
    refine: int = option(
        2,
        "Rounds that lower the error of the outputs after k-means, by the correlations of the inputs; 0 for k-means "
        "alone, as in the paper.",
        low=0,
        high=20,
    )
    experts: bool = option(False, "Quantize the experts of mixtures too, which are then served on CPUs only.")


class SqueezeLLM(Quantizer):
    """See the module."""

    Options = SqueezeLLMOptions
    options: SqueezeLLMOptions

    def __init__(self, options: SqueezeLLMOptions) -> None:
        super().__init__(options)
        inputs = Need.HESSIAN if options.refine else Need.SQUARES
        needs = {"gradients": {Need.GRADIENTS, inputs}, "inputs": {inputs}, "none": set[Need]()}
        self.needs = frozenset(needs[options.sensitivity])
        self.experts = options.experts

    def refusal(self, linear: Linear) -> str:
        """K has to fill whole words."""
        if linear.k % 32:
            return f"K is {linear.k}, not a multiple of 32, in which codes are packed\n  fix: use another method"
        return ""

    def quantize(self, linear: Linear, weight: Tensor, statistics: Statistics) -> Quantized:
        """Cluster every channel, weighted by what an error of a weight costs, and refine by the Hessian."""
        cost = _cost(weight, statistics)
        outliers = self._outliers(weight, statistics.gradients)
        dense = weight.masked_fill(outliers, 0.0)
        if cost is not None or bool(outliers.any()):
            cost = (torch.ones_like(weight) if cost is None else cost).masked_fill(outliers, 0.0)
        tables, codes = [], []
        step = max(1, CHUNK // max(weight.shape[1], CANDIDATES**2))
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            table = codebooks(dense[rows], 2**self.options.bits, None if cost is None else cost[rows])
            tables.append(table)
            codes.append(encode(dense[rows], table))
        table, code = torch.cat(tables), torch.cat(codes)
        if statistics.hessian is not None and cost is not None and self.options.refine:
            hessian = steadied(statistics.hessian, statistics.tokens)
            table, code = refined(dense, cost, hessian, table, self.options.refine)
        tensors = {"qweight": pack_stream(code, self.options.bits), "lookup_table": table}
        if bool(outliers.any()):
            # The sparse part holds what the codebook leaves over, so both together give the weight.
            tensors |= to_csr(torch.where(outliers, weight - table.gather(1, code.to(torch.int64)), 0.0))
        config = {"nnz": tensors["cols"].numel()} if "cols" in tensors else {}
        return Quantized(tensors, self.dequantize(tensors, {}), config)

    @classmethod
    def dequantize(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
        """Codebook entries and sparse parts."""
        return dequantize(tensors)

    def quantization_config(self, made: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Width, and the size of every sparse part."""
        sparse = {name: {"nnz": config["nnz"]} for name, config in made.items() if config}
        return quantization_config(self.options.bits, sparse)

    def _outliers(self, weight: Tensor, gradients: Tensor | None) -> Tensor:
        """Which weights go into the sparse part, bool [n, k]."""
        chosen = torch.zeros(weight.numel(), dtype=torch.bool)
        count = round(weight.numel() * self.options.sparsity / 100)
        sensitive = 0
        if gradients is not None and count:
            sensitive = min(count, round(weight.numel() * self.options.sensitive / 100))
            chosen[gradients.reshape(-1).topk(sensitive).indices] = True
        if count > sensitive:
            magnitude = weight.abs().reshape(-1).masked_fill(chosen, -1.0)
            chosen[magnitude.topk(count - sensitive).indices] = True
        return chosen.view(weight.shape)


def _cost(weight: Tensor, statistics: Statistics) -> Tensor | None:
    """What a squared error of a weight costs, [n, k]; None where all cost the same."""
    if statistics.gradients is not None:
        return statistics.gradients
    return None if statistics.squares is None else statistics.squares.expand_as(weight)
