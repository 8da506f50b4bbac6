"""HQQ (half-quadratic quantization, Badri and Shaji 2023): zeros fitted to the weights, outliers counting less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from quantserve.api import Checkpoint, Linear
from quantserve.errors import UsageError
from quantserve_hqq.format import BITS, PER_WORD, settings, tag
from quantserve_quantize import Quantized, Quantizer, Statistics, option, unquantized

GROUPS = (32, 64, 128, -1)
NORM, SHARPNESS, GROWTH, ROUNDS = 0.7, 10.0, 1.01, 20
"""The power of the errors that are made small, how closely outliers follow them, its growth by round, and rounds."""
SMALLEST = 2.0**-14
"""Of float16's normal numbers."""


@dataclass(frozen=True)
class HqqOptions:
    """Options of `quantserve quantize --method hqq`."""

    bits: int = option(4, "Bits of a code.", choices=BITS)
    group_size: int = option(64, "Inputs that share a scale and a zero; -1 for all.", choices=GROUPS)
    experts: bool = option(False, "Quantize the experts of mixtures too, which are then served on CPUs only.")


class Hqq(Quantizer):
    """See the module."""

    Options = HqqOptions
    options: HqqOptions
    skipped: Sequence[str] = ()
    """Kinds of linears that stay unquantized."""
    source_dtype = "bfloat16"
    """In which transformers computes."""

    def __init__(self, options: HqqOptions) -> None:
        super().__init__(options)
        self.experts = options.experts

    def begin(self, checkpoint: Checkpoint, linears: Sequence[Linear]) -> None:
        """Note what config and files repeat.

        Raises:
            UsageError: a kind of linear is to be quantized in some layers only, which HQQ's config cannot say.
        """
        self.source_dtype = checkpoint.torch_dtype or self.source_dtype
        self.skipped = sorted({tag(name) for name in unquantized(checkpoint, linears)})
        if both := {tag(linear.name) for linear in linears} & set(self.skipped):
            raise UsageError(
                f"hqq names linears by kind, and {sorted(both)[0]} can be quantized in some layers only\n"
                "  fix: use another method"
            )

    def refusal(self, linear: Linear) -> str:
        """Groups have to divide K, and words to be full."""
        group, per = self.options.group_size, PER_WORD[self.options.bits]
        if linear.k % 8 or (group != -1 and linear.k % group):
            fits = [str(one) for one in GROUPS if linear.k % (8 if one == -1 else one) == 0]
            fix = f"--group-size {', or '.join(fits)}" if fits else "use another method"
            return f"groups of {group} do not divide K = {linear.k}\n  fix: {fix}"
        rows = linear.n * linear.k // (linear.k if group == -1 else group)
        if self.options.bits != 3 and rows % per:
            return f"its {rows} groups do not fill words of {per}\n  fix: --bits 8"
        return ""

    def quantize(self, linear: Linear, weight: Tensor, statistics: Statistics) -> Quantized:
        """Fit zeros, then round to the nearest."""
        options, group = self.options, linear.k if self.options.group_size == -1 else self.options.group_size
        groups = weight.reshape(-1, group)
        scale, zero = fitted(groups, 2**options.bits - 1)
        codes = (groups / scale + zero).round().clamp(0, 2**options.bits - 1)
        tensors = {"W_q": words(codes, options.bits), "scale": scale.half(), "zero": zero.half()}
        tensors |= self._facts(weight.shape)
        return Quantized(tensors, self.dequantize(tensors, self.quantization_config({})))

    def _facts(self, shape: Sequence[int]) -> dict[str, Tensor]:
        """The settings that transformers reads beside each linear."""
        options = self.options
        size = {} if options.group_size == -1 else {"group_size": options.group_size}
        numbers = {"nbits": options.bits, "axis": 1, **size}
        flags = {
            "channel_wise": 1, "optimize": 1, "round_zero": 0, "view_as_float": 0, "offload_meta": 0, "quant_scale": 0,
            "quant_zero": 0, "encoded_state_dict": 1, "stores_quant_config": 1,
        }  # fmt: skip
        texts = {
            "packing": f"{options.bits}bit_{'32' if options.bits == 3 else 'u8'}",
            "unpack_view_dtype": "torch.int32" if options.bits == 3 else "torch.uint8",
            "compute_dtype": f"torch.{self.source_dtype}",
        }
        return {
            "shape": torch.tensor(list(shape)),
            **{name: torch.tensor(value, dtype=torch.int32) for name, value in numbers.items()},
            **{name: torch.tensor(value, dtype=torch.uint8) for name, value in flags.items()},
            **{name: torch.tensor(list(value.encode()), dtype=torch.uint8) for name, value in texts.items()},
        }

    @classmethod
    def dequantize(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
        """(code - zero) * scale.

        Raises:
            NotImplementedError: settings by kind of linear, or codes viewed as floats.
        """
        params = config["quant_config"]
        if "weight_quant_params" not in params or (made := settings(params)).view_as_float:
            raise NotImplementedError
        steps = range(PER_WORD[made.bits] - 1, -1, -1)
        codes = torch.cat([tensors["W_q"] >> made.bits * step & 2**made.bits - 1 for step in steps])
        zero, scale = tensors["zero"].float(), tensors["scale"].float()
        return ((codes[: len(zero)].float() - zero) * scale).view(*tensors["shape"].tolist())

    def quantization_config(self, made: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """transformers' spelling: one entry for all linears."""
        group = self.options.group_size
        params = {
            "nbits": self.options.bits,
            "channel_wise": True,
            "group_size": None if group == -1 else group,
            "optimize": True,
            "round_zero": False,
            "axis": 1,
            "view_as_float": False,
        }
        entry = {"weight_quant_params": params, "scale_quant_params": None, "zero_quant_params": None}
        return {
            "quant_method": "hqq",
            "quant_config": {**entry, "offload_meta": False},
            "skip_modules": list(self.skipped),
        }


def fitted(groups: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """Scales and zeros, float32 [groups, 1] with values of float16, for which codes are 0 to `last`.

    In turn: the errors, shrunk so that their sum of powers is small, are taken as outliers; the zero is the mean of
    what the rest asks for. Of the zeros so found each group keeps the one with the smallest sum of powers.
    """
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = ((high - low) / last).clamp_min(SMALLEST).half().float()
    zero = (-low / scale).half().float()
    best, least = zero, torch.full_like(zero, torch.inf)
    sharpness = SHARPNESS
    for _ in range(ROUNDS):
        codes = (groups / scale + zero).round().clamp(0, last)
        error = groups - (codes - zero) * scale
        size = error.abs()
        loss = size.pow(NORM).sum(1, keepdim=True)
        best, least = torch.where(loss < least, zero, best), torch.minimum(loss, least)
        outliers = error.sign() * (size - size.pow(NORM - 1) / sharpness).clamp_min(0)
        zero = (codes - (groups - outliers) / scale).mean(1, keepdim=True).half().float()
        sharpness *= GROWTH
    return scale, best


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes [groups, group] in bytes, or int32 with 3 bits, whose fields are rows a whole fraction of all apart."""
    per, dtype = PER_WORD[bits], torch.int32 if bits == 3 else torch.uint8
    missing = -len(codes) % per
    parts = torch.nn.functional.pad(codes, (0, 0, 0, missing)).to(dtype).chunk(per)
    return reduce(torch.bitwise_or, [part << bits * (per - 1 - at) for at, part in enumerate(parts)])
