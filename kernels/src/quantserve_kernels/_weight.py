"""A packed weight: made once at load, multiplied many times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from quantserve_kernels import _fallback
from quantserve_kernels._fallback import TILE
from quantserve_kernels._ops import allocate_codes, load

BITS = (2, 3, 4, 8)
STRIP = 512  # output channels whose codes are unpacked at once while packing: bounds the extra memory
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class PackedWeight:
    """W [n, k] of one linear, N = out_features, K = in_features.

    `W[n, k] = (table[n, code[n, k]] - zeros[n, g]) * scales[n, g] + sparse[n, k]` with g = k // group_size.

    Attributes:
        codes: uint8 (CPU) or int32 (GPU), in the layout of the device's kernel.
        table: float32 [n, 2**bits], a codebook per channel, or [1, 2**bits].
        scales: float16, bfloat16 or float32; [n/4, k/group_size, 4] (CPU) or [n, k/group_size] (GPU); None for none.
        zeros: the same shape and dtype; None for none.
        rows, cols, vals: int32 [n + 1], int32 [nnz], float32 [nnz]; a CSR matrix, columns rising in each row; or None.
        bits: 2, 3, 4 or 8.
        group_size: input features that share a scale; -1 is all of them.
    """

    codes: Tensor
    table: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    rows: Tensor | None
    cols: Tensor | None
    vals: Tensor | None
    bits: int
    n: int
    k: int
    group_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for value in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in pairs if isinstance(value, Tensor)}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [n, k]: what the kernels multiply with, before any rounding of theirs. CPU weights only."""
        codes = _fallback.unpack_codes(self.codes, self.bits, self.n, self.k, self.group_size)
        scales, zeros = (None if t is None else _fallback.plain(t, self.n) for t in (self.scales, self.zeros))
        weight = _fallback.decode(codes, self.table, scales, zeros, self.group_size, dtype)
        if self.rows is not None and self.cols is not None and self.vals is not None:
            channel, feature, values = _fallback.sparse_of(self.rows, self.cols, self.vals, self.k, self.group_size)
            weight.index_put_((channel, feature), values.to(dtype), accumulate=True)
        return weight


class Linear(torch.nn.Module):
    """A packed weight as a module, whose tensors move and show up like any other module's."""

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        for name in ("codes", "table", "scales", "zeros", "rows", "cols", "vals"):
            self.register_buffer(name, getattr(weight, name), persistent=False)
        self.bits, self.n, self.k, self.group_size = weight.bits, weight.n, weight.k, weight.group_size

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` [..., k] in float32, bfloat16 or float16 to [..., n] of the same dtype."""
        return torch.ops.quantserve_kernels.codebook_linear(
            x,
            self.codes,
            self.table,
            self.scales,
            self.zeros,
            self.rows,
            self.cols,
            self.vals,
            bias,
            self.bits,
            self.n,
            self.k,
            self.group_size,
        )

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return f"in_features={self.k}, out_features={self.n}, bits={self.bits}, group_size={self.group_size}"


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias`, accumulated in float32.

    Args:
        x: [..., k], float32, bfloat16 or float16. With bfloat16 the products may take the weights rounded to bfloat16;
            float32 and float16 see them in float32.
        weight: from `pack` or one of the `from_` functions.
        bias: [n], or None.

    Returns:
        [..., n] in x's dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, with the numbers.
    """
    return torch.ops.quantserve_kernels.codebook_linear(
        x,
        weight.codes,
        weight.table,
        weight.scales,
        weight.zeros,
        weight.rows,
        weight.cols,
        weight.vals,
        bias,
        weight.bits,
        weight.n,
        weight.k,
        weight.group_size,
    )


def pack(
    codes: Tensor | Callable[[int, int], Tensor],
    table: Tensor,
    *,
    bits: int,
    shape: tuple[int, int] | None = None,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    group_size: int = -1,
    sparse: tuple[Tensor, Tensor, Tensor] | None = None,
) -> PackedWeight:
    """Pack any weight-only format: codes, a codebook, and what is scaled or added.

    Args:
        codes: uint8 [n, k]; or a function of (first, last) that gives the codes of these output channels, called for a
            few hundred channels at a time, so that the codes of a layer never exist unpacked all at once.
        table: [n, 2**bits] or [1, 2**bits], any float dtype.
        bits: 2, 3, 4 or 8.
        shape: (n, k), needed where `codes` is a function.
        scales, zeros: [n, k / group_size]; see `PackedWeight`.
        group_size: divides k; -1 for one group.
        sparse: (rows, cols, vals) of a CSR matrix [n, k] to add; positions at most once.

    Returns:
        The weight, on the device of `table`.

    Raises:
        ValueError: something does not fit; says what, with the numbers.
    """
    load()
    if isinstance(codes, Tensor):
        if codes.ndim != 2 or codes.dtype != torch.uint8:
            raise ValueError(f"codes is {codes.dtype} {list(codes.shape)}, expected uint8 [n, k]")
        n, k = codes.shape
        channels = _rows_of(codes)
    else:
        if shape is None:
            raise ValueError("codes is a function, so shape=(n, k) is needed")
        (n, k), channels = shape, codes
    numbers = _fallback.shape_of(bits, k, group_size)
    if n < 1 or k < 1:
        raise ValueError(f"a weight [{n}, {k}] has nothing to multiply")
    table = _checked(table, "table", [(n, 2**bits), (1, 2**bits)]).to(torch.float32).contiguous()
    if zeros is not None and scales is None:
        raise ValueError("zeros without scales; pass scales of 1")
    if scales is not None:
        scales = _checked(scales, "scales", [(n, numbers.groups)])
        scales = (scales if scales.dtype in SCALE_DTYPES else scales.to(torch.float32)).contiguous()
        if zeros is not None:
            zeros = _checked(zeros, "zeros", [(n, numbers.groups)]).to(scales.dtype).contiguous()
        if table.shape[0] == 1:
            table, scales, zeros = _suited_to_bfloat16(table, scales, zeros)
        if table.device.type == "cpu":
            scales = _fallback.interleave(scales)
            zeros = None if zeros is None else _fallback.interleave(zeros)
        elif numbers.groups == 1:  # a scale a channel makes a codebook a channel, which GPUs multiply fastest
            table = ((table if zeros is None else table - zeros) * scales).contiguous()
            scales = zeros = None
    packed = _packed(channels, bits, n, group_size)
    rows, cols, vals = (None, None, None) if sparse is None else _checked_csr(*sparse, n=n, k=k, shape=numbers)
    return PackedWeight(
        packed,
        table,
        scales,
        zeros,
        rows,
        cols,
        vals,
        bits,
        n,
        k,
        group_size,
    )


def _rows_of(codes: Tensor) -> Callable[[int, int], Tensor]:
    return lambda first, last: codes[first:last]


def _packed(channels: Callable[[int, int], Tensor], bits: int, n: int, group_size: int) -> Tensor:
    """The codes of all strips in one tensor; on a CPU it is filled strip by strip, so nothing exists twice."""

    def strip(first: int) -> Tensor:
        codes = channels(first, min(first + STRIP, n)).contiguous()
        return torch.ops.quantserve_kernels.pack_codes(codes, bits, group_size)

    part = strip(0)
    if n <= STRIP:
        return part
    if part.device.type != "cpu":
        return torch.cat([part, *(strip(first) for first in range(STRIP, n, STRIP))])
    tile = part.numel() * TILE // STRIP
    whole = allocate_codes(-(-n // TILE) * tile)
    whole[: part.numel()] = part
    for first in range(STRIP, n, STRIP):
        part = strip(first)
        at = first // TILE * tile
        whole[at : at + part.numel()] = part
    return whole


def _checked(tensor: Tensor, name: str, shapes: list[tuple[int, int]]) -> Tensor:
    if tuple(tensor.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {expected}")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"{name} holds {bad} values that are not finite")
    return tensor


def _suited_to_bfloat16(table: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same weight written so that a codebook in bfloat16, as the fastest kernels keep it, loses least.

    With integer zero points the codebook is moved to be centred on 0: integers up to 256 are exact, and less cancels
    when the zero point is taken off a whole group's sum. Without zeros it is stretched by the factor in [1, 2) whose
    rounding errors are smallest: the few entries of NF4 would otherwise all carry the same bad luck.
    """
    if zeros is not None:
        shift = table.mean().round()
        moved = zeros - shift.to(zeros.dtype)
        whole = bool((zeros == zeros.round()).all()) and bool((moved.float() == zeros.float() - shift).all())
        return (table - shift, scales, moved) if whole else (table, scales, zeros)
    if torch.equal(table.bfloat16().float(), table):
        return table, scales, None
    factors = torch.linspace(1, 2, 513, dtype=torch.float64, device=table.device)[:-1, None]
    stretched = table.double() * factors
    errors = (stretched.bfloat16().double() / factors - table.double()).square().sum(1)
    best = factors[errors.argmin()].float()
    return table * best, scales.float() / best, None


def _checked_csr(
    rows: Tensor, cols: Tensor, vals: Tensor, *, n: int, k: int, shape: _fallback.Shape
) -> tuple[Tensor, Tensor, Tensor]:
    if rows.shape != (n + 1,):
        raise ValueError(f"rows has shape {list(rows.shape)}, expected [{n + 1}] (out_features + 1)")
    if cols.ndim != 1 or cols.shape != vals.shape:
        raise ValueError(f"cols has shape {list(cols.shape)} and vals {list(vals.shape)}; they must be equal, [nnz]")
    nnz = cols.numel()
    if int(rows[0]) != 0 or int(rows[-1]) != nnz or bool((rows.diff() < 0).any()):
        raise ValueError(f"rows must rise from 0 to nnz = {nnz}; it goes from {int(rows[0])} to {int(rows[-1])}")
    if nnz and not (int(cols.min()) >= 0 and int(cols.max()) < k):
        raise ValueError(f"cols holds {int(cols.min())}..{int(cols.max())}, expected 0..{k - 1} (in_features {k})")
    stored = cols.to(torch.int64)
    if cols.device.type == "cpu":  # whose kernels read x with every group padded; the GPU's read it as it is
        stored = stored // shape.group * shape.group_padded + stored % shape.group
    channel = torch.repeat_interleave(torch.arange(n, device=rows.device), rows.diff().to(torch.int64))
    order = (channel * int(shape.k_padded) + stored).argsort()  # the kernels look columns up
    stored, vals = stored[order], vals[order]
    return rows.to(torch.int32).contiguous(), stored.to(torch.int32).contiguous(), vals.to(torch.float32).contiguous()
