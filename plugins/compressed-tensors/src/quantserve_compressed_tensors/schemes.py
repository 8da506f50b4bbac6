"""The kinds of layers that vLLM 0.32 makes of a group of the config, and the tensors each of them has."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from quantserve.api import Dim, K, N, Part, Scheme
from quantserve_compressed_tensors.config import INTEGERS, PACKED, WITH_ACTIVATIONS, Args, Group

_SCALE = ("F32", "BF16", "F16")
_CHANNELS = ("channel", "group")


@dataclass(frozen=True)
class Kind:
    """A class of layers in vLLM.

    Attributes:
        name: as people write it: ``W4A16``.
        door: the kernels that compute it: ``mp`` (integer weights, 16-bit activations), ``int8``, ``fp8``, ``fp4``, or
            ``w4a8``.
        vllm: the name of vLLM's class.
    """

    name: str
    door: str
    vllm: str


def kind_of(group: Group) -> Kind | None:
    """The kind vLLM makes of a group, in the order in which vLLM asks; None where it stops."""
    w, x = group.weights, group.inputs
    if _is_nvfp4(w):
        kind = Kind("NVFP4", "fp4", "CompressedTensorsW4A4Fp4")
        return kind if x is None or _is_nvfp4(x) else None
    if w.symmetric and w.is_("float", 4, "group") and w.group_size == 32:
        eight = x is not None and x.is_("float", 8, "token", "group") and x.dynamic and x.symmetric
        return Kind("MXFP4", "fp4", "CompressedTensorsW4A8Mxfp4" if eight else "CompressedTensorsW4A4Mxfp4")
    if w.symmetric and w.is_("float", 8, "group") and w.group_size == 32 and w.scales.endswith("uint8"):
        return Kind("MXFP8", "fp8", "CompressedTensorsW8A8Mxfp8")
    if w.dynamic:
        return None
    integers = w.type == "int" and w.strategy in _CHANNELS
    eight = x is not None and x.is_("float", 8, "token") and x.dynamic and x.symmetric
    if eight and w.symmetric and w.is_("int", 4, "group"):
        return Kind("W4A8 (FP8 activations)", "w4a8", "CompressedTensorsW4A8Fp8")
    static = [one is not None and one.is_("int", 8, "tensor") and not one.dynamic for one in (x, group.outputs)]
    if integers and all(static) and group.format in (PACKED, INTEGERS):
        return Kind(f"W{w.bits}A8O8", "mp", "CompressedTensorsWNA8O8Int") if w.bits in (2, 4, 8) else None
    if group.format == PACKED:
        return _packed(w, x)
    if group.format not in WITH_ACTIVATIONS:
        return None
    if w.type == "float":
        good = w.symmetric and w.strategy in ("tensor", "channel", "block")
        return Kind("FP8", "fp8", "CompressedTensorsW8A8Fp8") if good else None
    if x is None or not w.symmetric or x.bits != 8:
        return None
    per_token = x.strategy == "token" and x.dynamic
    if (
        w.bits == 8
        and w.strategy in ("tensor", "channel")
        and (per_token or (x.strategy == "tensor" and not x.dynamic))
    ):
        return Kind("W8A8", "int8", "CompressedTensorsW8A8Int8")
    if w.bits == 4 and integers and per_token and x.type == "int":
        return Kind("W4A8", "w4a8", "CompressedTensorsW4A8Int")
    return None


def _packed(w: Args, x: Args | None) -> Kind | None:
    if w.strategy not in _CHANNELS or not 2 <= w.bits <= 8:
        return None
    if x is None:
        return Kind(f"W{w.bits}A16", "mp", "CompressedTensorsWNA16")
    good = w.type == "int" and x.type == "int" and x.symmetric and x.dynamic and x.strategy in ("token", "group")
    if good and x.bits in (4, 8):
        return Kind(f"W{w.bits}A{x.bits}", "w4a8", f"CompressedTensorsWNA{x.bits}Int")
    return None


def _is_nvfp4(args: Args) -> bool:
    return args.symmetric and args.is_("float", 4, "tensor_group") and args.group_size == 16


@lru_cache(maxsize=256)
def scheme_of(group: Group) -> Scheme | None:
    """The stored tensors of a linear [n, k] of a group; None where vLLM has no kind of layer for it."""
    kind = kind_of(group)
    if kind is None:
        return None
    w, x = group.weights, group.inputs
    per_group: Dim | int = K(w.group_size) if w.group_size else 1
    scale: Part | tuple[Part, ...] = Part((N(), per_group), _SCALE)
    if w.strategy == "tensor":
        scale = (Part((), _SCALE), Part((1,), _SCALE))
    elif w.block:
        scale = Part((N(w.block[0], partial=True), K(w.block[1], partial=True)), _SCALE)
    parts: dict[str, Part | tuple[Part, ...]]
    if kind.name == "NVFP4":
        parts = {
            "weight_packed": Part((N(), K(2)), ("U8",)),
            "weight_scale": Part((N(), K(16)), ("F8_E4M3",)),
            "weight_global_scale": Part((1,), ("F32",)),
        }
        if x is not None:
            parts["input_global_scale"] = Part((1,), ("F32",))
    elif kind.name == "MXFP4":
        parts = {"weight_packed": Part((N(), K(2)), ("U8",)), "weight_scale": Part((N(), K(32)), ("U8",))}
    elif kind.name == "MXFP8":
        parts = {"weight": Part((N(), K()), ("F8_E4M3",)), "weight_scale": Part((N(), K(32)), ("U8",))}
    elif group.format == PACKED:
        word = Fraction(32, w.bits)
        parts = {
            "weight_packed": Part((N(), K(word)), ("I32",)),
            "weight_scale": scale,
            "weight_shape": Part((2,), ("I64", "I32")),
        }
        if not w.symmetric:
            parts["weight_zero_point"] = Part((N(word), per_group), ("I32",))
    else:
        parts = {"weight": Part((N(), K()), ("I8" if w.type == "int" else "F8_E4M3",)), "weight_scale": scale}
    for name, args in (("input", x), ("output", group.outputs if kind.name.endswith("O8") else None)):
        if args is not None and not args.dynamic and kind.door != "fp4":
            parts[f"{name}_scale"] = (Part((), _SCALE), Part((1,), _SCALE))
            if not args.symmetric:
                parts[f"{name}_zero_point"] = (Part((), ("I8",)), Part((1,), ("I8",)))
    activations = x.bits if x is not None and kind.door != "mp" else 16
    shared = "block" if w.block else "tensor" if w.strategy == "tensor" else "group" if w.group_size else "channel"
    group_size = w.block[1] if w.block else w.group_size or -1
    return Scheme(parts, w.bits, group_size, shared, activations)  # type: ignore[arg-type]
