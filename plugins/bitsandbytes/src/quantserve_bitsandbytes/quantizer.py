"""NF4 (QLoRA, arXiv 2305.14314) in bitsandbytes' files: blocks of 64 weights with their largest magnitude."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantserve.api import Checkpoint, Linear
from quantserve_bitsandbytes.format import BLOCK, Settings, settings
from quantserve_kernels import NF4
from quantserve_quantize import Quantized, Quantizer, Statistics, option, unquantized

STATE = Settings("nf4").state


@dataclass(frozen=True)
class Nf4Options:
    """Options of `quantserve quantize --method bitsandbytes`."""

    experts: bool = option(False, "Quantize the experts of mixtures too, which are then served on CPUs only.")


class Nf4(Quantizer):
    """NF4 without double quantization: magnitudes are float32."""

    Options = Nf4Options
    options: Nf4Options
    kept: Sequence[str] = ()
    """Linears that stay unquantized, by path."""
    source_dtype = "bfloat16"
    """To which bitsandbytes dequantizes."""

    def __init__(self, options: Nf4Options) -> None:
        super().__init__(options)
        self.experts = options.experts

    def begin(self, checkpoint: Checkpoint, linears: Sequence[Linear]) -> None:
        """Note what the config and each linear's state repeat."""
        self.kept = unquantized(checkpoint, linears)
        self.source_dtype = checkpoint.torch_dtype or self.source_dtype

    def refusal(self, linear: Linear) -> str:
        """Blocks have to divide K."""
        if linear.k % BLOCK:
            return f"K is {linear.k}, which blocks of {BLOCK} do not divide\n  fix: use another method"
        return ""

    def quantize(self, linear: Linear, weight: Tensor, statistics: Statistics) -> Quantized:
        """Round to the nearest value of the table times the largest magnitude of the block."""
        table = torch.tensor(NF4)
        blocks = weight.reshape(-1, BLOCK)
        absmax = blocks.abs().amax(1)
        middles = (table[1:] + table[:-1]) / 2
        codes = torch.bucketize(
            blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None], middles, out_int32=True
        )
        pairs = codes.to(torch.uint8).view(-1, 2)
        state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": self.source_dtype, "shape": list(weight.shape)}
        tensors = {
            "weight": (pairs[:, 0] << 4 | pairs[:, 1])[:, None].contiguous(),
            "weight.absmax": absmax,
            "weight.quant_map": table,
            STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }
        return Quantized(tensors, self.dequantize(tensors, self.quantization_config({})))

    @classmethod
    def dequantize(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
        """Values of the table times magnitudes.

        Raises:
            NotImplementedError: FP4, int8, double quantization, or another storage than bytes.
        """
        if settings(config) != Settings("nf4"):
            raise NotImplementedError
        octets = tensors["weight"].view(-1)
        codes = torch.stack((octets >> 4, octets & 15), dim=-1).view(-1, BLOCK)
        shape = json.loads(bytes(tensors[STATE].tolist()))["shape"]
        return (tensors["weight.quant_map"][codes.long()] * tensors["weight.absmax"][:, None]).view(shape)

    def quantization_config(self, made: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """transformers' spelling."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": self.source_dtype,
            "llm_int8_skip_modules": list(self.kept),
        }
