"""What the operator refuses: the checks of csrc/ops.cpp, for the kernels that are called from Python."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from quantserve_kernels._fallback import TILE, shape_of

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


def codes_shape(layout: Layout, bits: int, n: int, k: int, group_size: int) -> tuple[int, ...]:
    """The shape that `pack` gives the codes of W [n, k]."""
    if layout == "cpu":
        return (-(-n // TILE) * TILE * shape_of(bits, k, group_size).k_padded * bits // 8,)
    if layout == "tensor cores":
        return (-(-n // 16), -(-k // 64), 32 * bits)
    chunks = -(-k * (2 if bits == 3 else bits) // 1024)
    return (n, 32 * (chunks + (-(-chunks // 2) if bits == 3 else 0)))


def check_linear(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    rows: Tensor | None,
    cols: Tensor | None,
    vals: Tensor | None,
    bias: Tensor | None,
    bits: int,
    n: int,
    k: int,
    group_size: int,
) -> Layout:
    """Refuse arguments that do not fit each other, from shapes, dtypes, strides and devices: no value is read.

    Raises:
        ValueError, TypeError: with the numbers and the fix.
    """
    groups = shape_of(bits, k, group_size).groups
    if not (1 <= n < MOST and 1 <= k < MOST):
        raise ValueError(f"n {n} and k {k} must be at least 1 and below 2^31")
    if x.dtype not in FLOATS:
        raise TypeError(f"x is {x.dtype}; known: float32, float16, bfloat16")
    if x.ndim < 1 or x.shape[-1] != k:
        raise ValueError(f"x has shape {list(x.shape)}, expected [..., {k}] (k)")
    if x.numel() // k >= MOST:
        raise ValueError(f"x has {x.numel() // k} rows, expected fewer than 2^31")
    layout = layout_of(codes)
    if (codes.device.type == "cpu") != (layout == "cpu"):
        raise ValueError(
            f"codes are packed for {'CPUs' if layout == 'cpu' else 'GPUs'} and are on {codes.device}. "
            "Fix: move the checkpoint's tensors and pack them again on that device"
        )
    _expect(codes, "codes", codes_shape(layout, bits, n, k, group_size), (codes.dtype,), x.device)
    _expect(table, "table", (1 if table.shape[:1] == (1,) else n, 2**bits), (torch.float32,), x.device)
    if layout == "tensor cores" and (bits == 8 or k % 8 or scales is not None):
        raise ValueError(
            f"codes are packed for tensor cores, which take no scales, 2 to 4 bits (bits {bits}) and k in "
            f"multiples of 8 (k {k}). Fix: pass what `pack` returned"
        )
    if zeros is not None and scales is None:
        raise ValueError("zeros need scales")
    side = (-(-n // TILE), groups, TILE) if layout == "cpu" else (n, groups)
    if scales is not None:
        _expect(scales, "scales", side, FLOATS, x.device)
        if zeros is not None:
            _expect(zeros, "zeros", side, (scales.dtype,), x.device)
    if rows is not None:
        if cols is None or vals is None:
            raise ValueError("rows, cols and vals come together")
        _expect(rows, "rows", (n + 1,), (torch.int32,), x.device)
        _expect(cols, "cols", (cols.numel(),), (torch.int32,), x.device)
        _expect(vals, "vals", (cols.numel(),), (torch.float32,), x.device)
    if bias is not None:
        _expect(bias, "bias", (n,), FLOATS, x.device)
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
