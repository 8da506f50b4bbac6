"""Weights rounded to FP8 (E4M3, arXiv 2209.05433) with the largest magnitude of a channel, tensor or block as scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantserve.api import Checkpoint, Linear
from quantserve_fp8.format import block_of
from quantserve_quantize import Quantized, Quantizer, Statistics, option, unquantized

BLOCK = 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Fp8Options:
    """Options of `quantserve quantize --method fp8`."""

    scales: str = option(
        "channel",
        f"What shares a scale: an output channel (served on CPUs only), a {BLOCK} x {BLOCK} block, or a tensor.",
        choices=("channel", "block", "tensor"),
    )


class Fp8(Quantizer):
    """See the module."""

    Options = Fp8Options
    options: Fp8Options
    experts = True
    kept: Sequence[str] = ()
    """Linears that stay unquantized, by path."""

    def begin(self, checkpoint: Checkpoint, linears: Sequence[Linear]) -> None:
        """Note what stays unquantized: the config names it."""
        self.kept = unquantized(checkpoint, linears)

    def refusal(self, linear: Linear) -> str:
        """Whole blocks only: parts of a fused layer would meet within one."""
        if self.options.scales == "block" and (linear.n % BLOCK or linear.k % BLOCK):
            return f"it is [{linear.n}, {linear.k}], not in multiples of {BLOCK}\n  fix: --scales channel, or tensor"
        return ""

    def quantize(self, linear: Linear, weight: Tensor, statistics: Statistics) -> Quantized:
        """Round to the nearest."""
        n, k = weight.shape
        rows, columns = {"channel": (1, k), "block": (BLOCK, BLOCK), "tensor": (n, k)}[self.options.scales]
        tiles = weight.view(n // rows, rows, k // columns, columns)
        scales = tiles.abs().amax((1, 3), keepdim=True) / LARGEST
        scales = torch.where(scales < torch.finfo(torch.float32).tiny, 1.0, scales)
        if self.options.scales == "tensor":
            # vLLM rounds the parts of a fused layer again to their largest scale; between powers of two that is exact.
            scales = torch.exp2(scales.log2().ceil())
        values = (tiles / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(n, k)
        if self.options.scales == "block":
            tensors = {"weight": values, "weight_scale_inv": scales.view(n // BLOCK, k // BLOCK)}
        else:
            tensors = {"weight": values, "weight_scale": scales.view(-1, 1) if rows == 1 else scales.view(())}
        return Quantized(tensors, self.dequantize(tensors, self.quantization_config({})))

    @classmethod
    def dequantize(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
        """Value times scale."""
        values, block = tensors["weight"].float(), block_of(config)
        if block is None:
            return values * tensors["weight_scale"].float()
        n, k = values.shape
        scales = tensors["weight_scale_inv"].float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        return values * scales[:n, :k]

    def quantization_config(self, made: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """transformers' spelling, which vLLM reads, too; engines on GPUs round activations by the scheme."""
        config: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        if self.options.scales == "block":
            config["weight_block_size"] = [BLOCK, BLOCK]
        return config | {"modules_to_not_convert": list(self.kept)}
