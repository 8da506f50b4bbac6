"""What the operator refuses: the checks of csrc/ops.cpp, for the kernels that are called from Python."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from quantserve_kernels._arguments import Packed, of_experts, of_linear
from quantserve_kernels._fallback import ACTIVATIONS, columns_of, shape_of, tile_of

Layout = Literal["cpu", "tensor cores", "words"]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MOST = 2**31  # sizes are 32-bit integers in the kernels


def layout_of(codes: Tensor) -> Layout:
    """The layout of packed codes, which their dtype and number of dimensions record.

    Raises:
        TypeError: `pack` makes no such codes.
    """
    known: dict[tuple[torch.dtype, int], Layout] = {
        (torch.uint8, 1): "cpu",
        (torch.int32, 3): "tensor cores",
        (torch.int32, 2): "words",
    }
    layout = known.get((codes.dtype, codes.ndim))
    if layout is None:
        raise TypeError(
            f"codes is {codes.dtype} {list(codes.shape)}, expected uint8 [bytes] (CPU), int32 [n/16, k/64, words] or "
            "int32 [n, words] (GPU). Fix: pass what `pack` returned"
        )
    return layout


def codes_shape(layout: Layout, table: Tensor, bits: int, n: int, k: int, group_size: int) -> tuple[int, ...]:
    """The shape that `pack` gives the codes of W [n, k]."""
    if layout == "cpu":
        tile, shape = tile_of(table), shape_of(bits, k, group_size, columns_of(table))
        return (-(-n // tile) * tile * shape.k_padded * bits // 8,)
    if layout == "tensor cores":
        return (-(-n // 16), -(-k // 64), 32 * bits)
    chunks = -(-k * (2 if bits == 3 else bits) // 1024)
    return (n, 32 * (chunks + (-(-chunks // 2) if bits == 3 else 0)))


def check_linear(*arguments: Any) -> Layout:
    """Refuse arguments that do not fit each other, from shapes, dtypes, strides and devices: no value is read.

    Raises:
        ValueError, TypeError: with the numbers and the fix.
    """
    x, weight, bias = of_linear(arguments)
    n, k = weight.n, weight.k
    shape_of(weight.bits, k, weight.group_size, columns=False)
    if not (1 <= n < MOST and 1 <= k < MOST):
        raise ValueError(f"n {n} and k {k} must be at least 1 and below 2^31")
    if x.dtype not in FLOATS:
        raise TypeError(f"x is {x.dtype}; known: float32, float16, bfloat16")
    if x.ndim < 1 or x.shape[-1] != k:
        raise ValueError(f"x has shape {list(x.shape)}, expected [..., {k}] (k)")
    if x.numel() // k >= MOST:
        raise ValueError(f"x has {x.numel() // k} rows, expected fewer than 2^31")
    layout = _check_weight("", x.device, weight)
    if bias is not None:
        _expect(bias, "bias", (n,), FLOATS, x.device)
    return layout


def check_experts(*arguments: Any) -> None:
    """Refuse arguments of `codebook_experts` that do not fit each other; the ids are read.

    Raises:
        ValueError, TypeError: with the numbers and the fix.
    """
    x, topk_ids, topk_weights, activation, w13, w13_bias, w2, w2_bias = of_experts(arguments)
    if x.dtype not in FLOATS:
        raise TypeError(f"x is {x.dtype}; known: float32, float16, bfloat16")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation}; known: {', '.join(ACTIVATIONS)}")
    _check_weight("w13_", x.device, w13)
    _check_weight("w2_", x.device, w2)
    n13, hidden, n2, width = w13.n, w13.k, w2.n, w2.k
    tiles = tile_of(w13.table), tile_of(w2.table)
    if 2 * width % tiles[0] or hidden % tiles[1]:
        raise ValueError(
            f"2 * w2_k, {2 * width}, must be a multiple of {tiles[0]} and w13_k {hidden} one of {tiles[1]}"
        )
    count = n2 // hidden
    if n2 != count * hidden or n13 != count * 2 * width:
        raise ValueError(
            f"w13 is [{n13}, {hidden}] and w2 [{n2}, {width}], expected [experts * {2 * width}, {hidden}] and "
            f"[experts * {hidden}, {width}]"
        )
    if x.ndim != 2 or x.shape[1] != hidden:
        raise ValueError(f"x has shape {list(x.shape)}, expected [tokens, {hidden}] (w13_k)")
    if topk_ids.ndim != 2 or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(f"topk_ids has shape {list(topk_ids.shape)}, expected [{x.shape[0]}, choices]")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_ids is {topk_ids.dtype}, expected int32 or int64")
    _expect(topk_weights, "topk_weights", tuple(topk_ids.shape), (torch.float32,), x.device)
    for bias, name, shape in ((w13_bias, "w13_bias", (count, 2 * width)), (w2_bias, "w2_bias", (count, hidden))):
        if bias is not None:
            _expect(bias, name, shape, FLOATS, x.device)
    if topk_ids.numel() and not (int(topk_ids.min()) >= -1 and int(topk_ids.max()) < count):
        raise ValueError(f"topk_ids holds {int(topk_ids.min())}..{int(topk_ids.max())}, expected -1..{count - 1}")


def _check_weight(owner: str, device: torch.device, weight: Packed) -> Layout:
    """The fields of a PackedWeight; `owner` goes before their names."""
    codes, table, scales, zeros, rows, cols, vals, bits, n, k, group_size = weight
    groups = shape_of(bits, k, group_size, columns_of(table)).groups
    layout = layout_of(codes)
    if (codes.device.type == "cpu") != (layout == "cpu"):
        raise ValueError(
            f"{owner}codes are packed for {'CPUs' if layout == 'cpu' else 'GPUs'} and are on {codes.device}. "
            "Fix: move the checkpoint's tensors and pack them again on that device"
        )
    _expect(codes, f"{owner}codes", codes_shape(layout, table, bits, n, k, group_size), (codes.dtype,), device)
    _expect(table, f"{owner}table", (1 if table.shape[:1] == (1,) else n, 2**bits), (torch.float32,), device)
    if layout == "tensor cores" and (bits == 8 or k % 8 or scales is not None):
        raise ValueError(
            f"{owner}codes are packed for tensor cores, which take no scales, 2 to 4 bits (bits {bits}) and k in "
            f"multiples of 8 (k {k}). Fix: pass what `pack` returned"
        )
    if zeros is not None and scales is None:
        raise ValueError(f"{owner}zeros need scales")
    side = (-(-n // tile_of(table)), groups, tile_of(table)) if layout == "cpu" else (n, groups)
    if scales is not None:
        _expect(scales, f"{owner}scales", side, FLOATS, device)
        if zeros is not None:
            _expect(zeros, f"{owner}zeros", side, (scales.dtype,), device)
    if rows is not None:
        if cols is None or vals is None:
            raise ValueError(f"{owner}rows, cols and vals come together")
        _expect(rows, f"{owner}rows", (n + 1,), (torch.int32,), device)
        _expect(cols, f"{owner}cols", (cols.numel(),), (torch.int32,), device)
        _expect(vals, f"{owner}vals", (cols.numel(),), (torch.float32,), device)
    return layout


def _expect(
    tensor: Tensor, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and x on {device}. Fix: have both on one device")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous. Fix: pass {name}.contiguous()")
