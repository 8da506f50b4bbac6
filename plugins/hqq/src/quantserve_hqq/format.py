"""HQQ's settings and the tensors of a linear, as data: what the checks and vLLM's side both read. Imports no torch.

The layouts are those of ``hqq.core.bitpack`` (hqq 0.2.8), axis 1: the weight [n, k] as [groups, group_size], of which
the words of a column hold rows that are a whole fraction of all groups apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

from quantserve.api import NK, K, N, Part, Scheme

BITS = (2, 3, 4, 8)
PER_WORD = {2: 4, 3: 10, 4: 2, 8: 1}
"""Codes in a word of the file: a byte, and an int32 with 3 bits."""
FLOATS = ("F16", "BF16", "F32")
SETTINGS = (
    "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale",
    "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
    "optimize", "round_zero",
)  # fmt: skip
"""Tensors that repeat the settings beside each linear and carry no weights."""


@dataclass(frozen=True)
class Settings:
    """How linears are quantized: `group_size` is None for one group for each out_feature."""

    bits: int
    group_size: int | None
    view_as_float: bool

    def __str__(self) -> str:
        """For messages."""
        groups = f"groups of {self.group_size}" if self.group_size else "a group for each channel"
        return f"{self.bits} bits, {groups}{', as float' if self.view_as_float else ''}"


def tag(module: str) -> str:
    """What transformers calls a linear in these configs: ``self_attn.q_proj``, in every layer."""
    return ".".join(one for one in module.split(".") if one not in ("model", "layers") and not one.isdecimal())


def entry(config: Mapping[str, Any], module: str) -> object:
    """What a quantization config says of a linear; None where it leaves it unquantized."""
    params, skipped = config.get("quant_config"), config.get("skip_modules")
    if not isinstance(params, Mapping) or (isinstance(skipped, list) and tag(module) in skipped):
        return None
    return params if "weight_quant_params" in params else params.get(tag(module))


def entries(config: Mapping[str, Any]) -> dict[str, object]:
    """All that a quantization config says, by field path: one entry, or one for each kind of linear."""
    params = config.get("quant_config")
    if not isinstance(params, Mapping) or "weight_quant_params" in params:
        return {"quant_config": params}
    return {f"quant_config.{name}": value for name, value in params.items() if value is not None}


def settings(value: object) -> Settings:
    """The settings of an entry.

    Raises:
        ValueError: it is not HQQ's, or nothing that is served; says which field.
    """
    params = value.get("weight_quant_params") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(params, Mapping):
        raise ValueError("weight_quant_params is missing")
    bits, group, axis = params.get("nbits"), params.get("group_size"), params.get("axis")
    if isinstance(bits, bool) or bits not in BITS:
        raise ValueError(f"nbits is {_short(bits)}; served are 2, 3, 4 and 8")
    if axis != 1 or isinstance(axis, bool):
        raise ValueError(
            f"axis is {_short(axis)}; served is 1. With axis 0 a scale belongs to weights of different out_features at "
            "the same input, so that each weight of a row has another scale"
        )
    if group is not None and (not isinstance(group, int) or isinstance(group, bool) or group < 8 or group % 8):
        raise ValueError(f"group_size is {str(group)[:40]}; a multiple of 8, or null for one group for each channel")
    if params.get("channel_wise", True) is not True:
        raise ValueError("channel_wise is false: one scale for a whole weight is not served")
    if value.get("scale_quant_params") or value.get("zero_quant_params"):
        raise ValueError("scales or zeros are quantized (quant_scale, quant_zero), which hqq itself has given up")
    return Settings(bits, group, params.get("view_as_float") is True)


def _short(value: object) -> str:
    return "missing" if value is None else str(value)[:40]


@cache
def stored(made: Settings) -> Scheme:
    """The tensors of a file."""
    per, group = PER_WORD[made.bits], made.group_size
    rows = NK(per * group, partial=made.bits == 3, free=True) if group else N(per, partial=made.bits == 3, free=True)

    def words(dtypes: tuple[str, ...], octets: int, size: int) -> Part:
        columns = group * octets // size if group else K(Fraction(size, octets), free=True)
        return Part((rows, columns), dtypes)

    integers, octets = (("I32",), 4) if made.bits == 3 else (("U8",), 1)
    codes: Part | tuple[Part, ...] = words(integers, octets, octets)
    if made.view_as_float:
        codes = (words(("F16", "BF16"), octets, 2), words(("F32",), octets, 4))
    texts = {name: Part((None,), ("U8",), optional=True) for name in ("packing", "unpack_view_dtype", "compute_dtype")}
    numbers = {name: Part((), ("I32", "U8"), optional=True) for name in SETTINGS if name not in (*texts, "shape")}
    return Scheme(
        {"W_q": codes, **_groups(group), "shape": Part((2,), ("I64",), optional=True), **texts, **numbers},
        bits=made.bits,
        group_size=group or -1,
        scales="group" if group else "channel",
        kept=made.bits + 32 / group if group else made.bits,
    )


@cache
def engine(made: Settings) -> Scheme:
    """The tensors as ranks can cut them: codes along K, the first in the lowest bits of a byte; 3 bits take 4."""
    codes = Part((N(), K({2: 4, 3: 2, 4: 2, 8: 1}[made.bits])), ("U8",))
    return Scheme({"W_q": codes, **_groups(made.group_size)}, bits=made.bits, group_size=made.group_size or -1)


def _groups(group: int | None) -> dict[str, Part]:
    part = Part((NK(group) if group else N(), 1), FLOATS)
    return {"scale": part, "zero": part}
