"""bitsandbytes' settings and the tensors of a linear, as data: what the checks and vLLM's side read. Imports no torch.

The layouts are those of ``bitsandbytes.functional.QuantState.as_dict`` and of ``Linear8bitLt`` (bitsandbytes 0.50).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from quantserve.api import NK, K, N, Part, Scheme

BLOCK, NESTED = 64, 256
"""Weights that share an absmax, and absmax values that share one of the second quantization."""
STORAGE = {"uint8": ("U8", 2), "int8": ("I8", 2), "float16": ("F16", 4), "bfloat16": ("BF16", 4), "float32": ("F32", 8)}
"""`bnb_4bit_quant_storage`: the dtype of a file's weight, and codes in an element."""


@dataclass(frozen=True)
class Settings:
    """How linears are quantized; `storage` and `double` are of 4 bits."""

    kind: Literal["nf4", "fp4", "int8"]
    double: bool = False
    storage: str = "uint8"

    @property
    def state(self) -> str:
        """The suffix of the tensor that holds block size, shape and offset as JSON."""
        return f"weight.quant_state.bitsandbytes__{self.kind}"


def settings(config: Mapping[str, Any]) -> Settings:
    """The settings of a quantization config.

    Raises:
        ValueError: it is not one of bitsandbytes; says which field.
    """
    four, eight = (config.get(f"load_in_{bits}bit", config.get(f"_load_in_{bits}bit")) for bits in (4, 8))
    if eight is True and not four:
        return Settings("int8")
    if four is not True or eight:
        raise ValueError(
            f"load_in_4bit is {str(four)[:20]} and load_in_8bit {str(eight)[:20]}; one of them must be true"
        )
    kind, storage = config.get("bnb_4bit_quant_type", "fp4"), str(config.get("bnb_4bit_quant_storage") or "uint8")
    if kind not in ("nf4", "fp4"):
        raise ValueError(f"bnb_4bit_quant_type is {str(kind)[:40]!r}; known are nf4 and fp4")
    if storage not in STORAGE:
        raise ValueError(f"bnb_4bit_quant_storage is {storage[:40]!r}; known are {', '.join(STORAGE)}")
    return Settings(kind, config.get("bnb_4bit_use_double_quant") is True, storage)


@cache
def stored(made: Settings) -> Scheme:
    """The tensors of a file."""
    if made.kind == "int8":
        parts = {"weight": Part((N(), K()), ("I8",)), "SCB": Part((N(),), ("F32",))}
        parts["weight_format"] = Part((), ("U8",), optional=True)  # 0: row by row, as everything is saved
        return Scheme(parts, bits=8, scales="channel")
    dtype, per = STORAGE[made.storage]
    nested = Part((NK(BLOCK * NESTED, partial=True, free=True),), ("F32",))
    return _four_bits(made, Part((NK(per), 1), (dtype,)), nested, Part((None,), ("U8",)))


@cache
def engine(made: Settings) -> Scheme:
    """The tensors as ranks can cut them: a second absmax for each block, and its offset as a number."""
    if made.kind == "int8":
        return stored(made)
    return _four_bits(made, Part((NK(2), 1), ("U8",)), Part((NK(BLOCK),), ("F32",)), Part((1,), ("F32",)))


def _four_bits(made: Settings, weight: Part, nested: Part, state: Part) -> Scheme:
    parts = {
        "weight": weight,
        "weight.absmax": Part((NK(BLOCK),), ("U8",) if made.double else ("F32",)),
        "weight.quant_map": Part((16,), ("F32",)),
        made.state: state,
    }
    if made.double:
        parts |= {"weight.nested_absmax": nested, "weight.nested_quant_map": Part((NESTED,), ("F32",))}
    return Scheme(parts, bits=4, group_size=BLOCK, kept=4 + 32 / BLOCK)
