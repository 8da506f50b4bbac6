"""The quantizer of GPTQ (arXiv 2210.17323), in the files of AutoGPTQ's version 1, which vLLM and this plugin serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantserve.api import Linear
from quantserve_gptq._columns import asymmetric, rounded, symmetric
from quantserve_gptq._packing import stored_zeros
from quantserve_gptq.config import BITS, VERSIONS
from quantserve_kernels import pack_stream, unpack_stream
from quantserve_quantize import Need, Quantized, Quantizer, Statistics, option
from quantserve_quantize.hessian import steadied

GROUPS = (32, 64, 128, -1)
WORD = 32
"""Codes of any width that fill whole int32 words."""


@dataclass(frozen=True)
class GPTQOptions:
    """Options of `quantserve quantize --method gptq`."""

    bits: int = option(4, "Bits of a code. vLLM's own GPTQ serves 4 and 8.", choices=BITS)
    group_size: int = option(128, "Inputs that share a scale; -1 for all.", choices=GROUPS)
    sym: bool = option(True, "Zeros in the middle. vLLM's own GPTQ serves no others; quantserve's engine side does.")
    damp: float = option(0.01, "Added to the Hessian's diagonal, as a part of its mean.", low=1e-6, high=10)
    act_order: str = option(
        "static",
        "Inputs with the largest mean square first: static keeps groups of neighbours and gives ordinary files; on "
        "forms groups in that order (desc_act), served by quantserve's engine side, without tensor parallelism.",
        choices=("off", "static", "on"),
    )
    scales: str = option(
        "search", "Of a group: by its largest weight, or by a search for the smallest error.", choices=("search", "max")
    )


class GPTQ(Quantizer):
    """See the module."""

    Options = GPTQOptions
    options: GPTQOptions
    needs = frozenset({Need.HESSIAN})

    def refusal(self, linear: Linear) -> str:
        """Groups have to divide K, and codes and zeros to fill words."""
        group = self.options.group_size
        if linear.k % WORD or linear.n % WORD:
            return f"it is [{linear.n}, {linear.k}], not in multiples of {WORD}\n  fix: use another method"
        if group != -1 and linear.k % group:
            fits = [str(one) for one in GROUPS if one == -1 or linear.k % one == 0]
            return f"groups of {group} do not divide K = {linear.k}\n  fix: --group-size {', or '.join(fits)}"
        return ""

    def quantize(self, linear: Linear, weight: Tensor, statistics: Statistics) -> Quantized:
        """Round input after input."""
        options, k = self.options, linear.k
        assert statistics.hessian is not None
        fit = (symmetric if options.sym else asymmetric)(options.bits, options.scales == "search")
        group = k if options.group_size == -1 else options.group_size
        hessian = steadied(statistics.hessian, statistics.tokens)
        codes, grid, group_of = rounded(weight, hessian, group, options.bits, fit, options.damp, options.act_order)
        stored = grid.zeros.to(torch.uint8) - VERSIONS["gptq"]
        tensors = {
            "qweight": pack_stream(codes, options.bits),
            "qzeros": pack_stream(stored.t(), options.bits).t().contiguous(),
            "scales": grid.scales.t().contiguous().half(),
            "g_idx": group_of.to(torch.int32),
        }
        return Quantized(tensors, self.dequantize(tensors, self.quantization_config({})))

    @classmethod
    def dequantize(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
        """(code - zero) * scale."""
        bits, group_of = config["bits"], tensors["g_idx"].long()
        offset = VERSIONS[config.get("checkpoint_format") or "gptq"]
        codes = unpack_stream(tensors["qweight"], bits).float()
        zeros = stored_zeros(tensors["qzeros"], bits, offset).t().float()
        if config["sym"]:
            zeros = torch.full_like(zeros, 2 ** (bits - 1))
        return (codes - zeros[:, group_of]) * tensors["scales"].t().float()[:, group_of]

    def quantization_config(self, made: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The settings of all linears."""
        options = self.options
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": options.bits,
            "group_size": options.group_size,
            "sym": options.sym,
            "desc_act": options.act_order == "on" and options.group_size != -1,
            "damp_percent": options.damp,
            "lm_head": False,
        }
