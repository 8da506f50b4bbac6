"""The kinds of layers that vLLM 0.32 makes of a group of the config, and the tensors of a linear of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from quantserve.api import Dim, K, N, Part, Scheme
from quantserve_compressed_tensors.config import FLOATS, INTEGERS, NAIVE, PACKED, Args, Group

WITH_ACTIVATIONS = (NAIVE, INTEGERS, FLOATS, "nvfp4-pack-quantized")
"""Formats of which vLLM expects quantized activations, or floating-point weights."""
_SCALE = ("F32", "BF16", "F16")
_ROWS = ("channel", "group")
_TENSOR = ((), (1,))


class Kind(NamedTuple):
    """A kind of layers in vLLM.

    Attributes:
        name: as people write it: ``W4A16``.
        door: the kernels that compute it: ``mp`` (integer weights, 16-bit activations), ``int8``, ``fp8``, ``fp4``, or
            ``w4a8``.
    """

    name: str
    door: str


def kind_of(group: Group) -> Kind | None:
    """The kind vLLM makes of a group, in the order in which vLLM asks; None where it stops.

    Act-order by groups, at which vLLM 0.32 stops as well, counts as what it is without.
    """
    w, x, form = group.weights, group.inputs, group.format
    if form in WITH_ACTIVATIONS and x is None and w.type == "int":
        return None
    if _is_nvfp4(w):
        return Kind("NVFP4", "fp4") if x is None or _is_nvfp4(x) else None
    if w.symmetric and w.is_("float", 4, "group") and w.group_size == 32:
        return Kind("MXFP4", "fp4")
    if w.symmetric and w.is_("float", 8, "group") and w.group_size == 32 and w.exponents:
        return Kind("MXFP8", "fp8")
    if w.dynamic:
        return None
    dynamic = x is not None and x.dynamic
    by_token = x is not None and x.strategy == "token" and x.dynamic
    integers = w.type == "int" and w.strategy in _ROWS
    if x and by_token and x.is_("float", 8, "token") and x.symmetric and w.symmetric and w.is_("int", 4, "group"):
        return Kind("W4A8 (FP8 activations)", "w4a8")
    static = (one is not None and one.is_("int", 8, "tensor") and not one.dynamic for one in (x, group.outputs))
    if integers and form in (PACKED, INTEGERS) and all(static):
        return Kind(f"W{w.bits}A8O8", "mp") if w.bits in (2, 4, 8) else None
    if form == PACKED and x is None and w.strategy in _ROWS and 2 <= w.bits <= 8:
        return Kind(f"W{w.bits}A16", "mp")
    if form == PACKED and x and integers and 2 <= w.bits <= 8 and x.type == "int" and x.symmetric and dynamic:
        return Kind(f"W{w.bits}A{x.bits}", "w4a8") if x.strategy in (*_ROWS, "token") and x.bits in (4, 8) else None
    if form not in WITH_ACTIVATIONS or not w.symmetric:
        return None
    if w.type == "float":
        return Kind("FP8", "fp8") if w.strategy in ("tensor", "channel", "block") else None
    if x is None or x.bits != 8:
        return None
    if w.bits == 8 and w.strategy in ("tensor", "channel") and (by_token or (x.strategy == "tensor" and not dynamic)):
        return Kind("W8A8", "int8")
    return Kind("W4A8", "w4a8") if w.bits == 4 and integers and by_token and x.type == "int" else None


def _is_nvfp4(args: Args) -> bool:
    return args.symmetric and args.is_("float", 4, "tensor_group") and args.group_size == 16


@dataclass(frozen=True)
class Layout(Scheme):
    """A scheme that knows how its weights are quantized."""

    args: Args = field(default_factory=Args)


@lru_cache(maxsize=256)
def layout_of(group: Group, *, engine: bool = False) -> Layout | None:
    """The stored tensors of a linear [n, k] of a group; None where vLLM has no kind of layer for it.

    Args:
        group: of the config.
        engine: as this plugin's engine side holds them: scales of blocks and zero points by row, codes of widths that
            leave bits of a word unused as bytes, and nothing of activations.
    """
    kind, w = kind_of(group), group.weights
    if kind is None:
        return None
    columns = w.block[1] if w.block else w.group_size
    along = K(columns, partial=w.block is not None) if columns else 1
    octets = w.type == "float" and w.bits == 4
    scale: Part | tuple[Part, ...] = Part((N(), along), ("U8",) if kind.name in ("MXFP4", "MXFP8") else _SCALE)
    if kind.name == "NVFP4":
        scale = Part((N(), along), ("F8_E4M3",))
    elif w.strategy == "tensor":
        scale = tuple(Part(shape, _SCALE) for shape in _TENSOR)
    elif w.block and not engine:
        scale = Part((N(w.block[0], partial=True), along), _SCALE)
    codes: dict[str, Part | tuple[Part, ...]] = {"weight": Part((N(), K()), ("I8" if w.type == "int" else "F8_E4M3",))}
    if octets:
        codes = {"weight_packed": Part((N(), K(2)), ("U8",))}
    elif group.format == PACKED and engine and 32 % w.bits:
        codes = {"weight_packed": Part((N(), K()), ("U8",))}
    elif group.format == PACKED:
        codes = {"weight_packed": tuple(Part((N(), one), ("I32",)) for one in _words(K, w.bits))}
    parts: dict[str, Part | tuple[Part, ...]] = {**codes, "weight_scale": scale}
    if kind.name == "NVFP4":
        parts["weight_global_scale"] = Part((1,), ("F32",))
    if not w.symmetric:
        words = tuple(Part((one, along), ("I32",)) for one in _words(N, w.bits))
        parts["weight_zero_point"] = Part((N(), along), ("U8",)) if engine else words
    if w.act_order:
        parts["weight_g_idx"] = Part((K(),), ("I32",))
    if not engine:
        parts |= _beside(group, kind)
    x = group.inputs
    return Layout(
        parts, w.bits, columns or -1,
        "block" if w.block else "tensor" if w.strategy == "tensor" else "group" if columns else "channel",
        x.bits if x is not None and kind.door != "mp" else 16, args=w,
    )  # fmt: skip


def _words(axis: Callable[..., Dim], bits: int) -> tuple[Dim, ...]:
    """How codes lie in int32 words along an axis.

    Codes of widths that do not divide 32 are a stream of bits (compressed-tensors 0.19), or as many whole ones as a
    word holds (0.17). The engine's side takes these apart, so ranks may cut them anywhere.
    """
    if 32 % bits == 0:
        return (axis(32 // bits),)
    return (axis(Fraction(32, bits), partial=True, free=True), axis(32 // bits, partial=True, free=True))


def _beside(group: Group, kind: Kind) -> dict[str, Part | tuple[Part, ...]]:
    """What vLLM reads besides the weights: scales of activations, and the shape."""
    parts: dict[str, Part | tuple[Part, ...]] = {}
    if group.format == PACKED and group.weights.type == "int":
        parts["weight_shape"] = Part((2,), ("I64", "I32"))
    if kind.name == "NVFP4" and group.inputs is not None:
        parts["input_global_scale"] = Part((1,), ("F32",))
    for name, args in (("input", group.inputs), ("output", group.outputs if kind.name.endswith("O8") else None)):
        if args is not None and not args.dynamic and kind.door != "fp4":
            parts[f"{name}_scale"] = tuple(Part(shape, _SCALE) for shape in _TENSOR)
            if not args.symmetric:
                parts[f"{name}_zero_point"] = tuple(Part(shape, ("I8",)) for shape in _TENSOR)
    return parts
