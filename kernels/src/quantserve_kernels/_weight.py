"""A packed weight: made once at load, multiplied many times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from quantserve_kernels import _fallback
from quantserve_kernels._arguments import TENSORS, numbers_of, tensors_of
from quantserve_kernels._checks import MOST, Layout, layout_of
from quantserve_kernels._ops import allocate_codes, load

BITS = (2, 3, 4, 8)
STRIP = 512  # output channels whose codes are unpacked at once while packing: bounds the extra memory
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Magnitudes from which rounding to a dtype gives infinity.
BFLOAT16_ENDS, FLOAT16_ENDS = 2.0**128 - 2.0**119, 2.0**16 - 2.0**4


@dataclass(frozen=True)
class PackedWeight:
    """W [n, k] of one linear, N = out_features, K = in_features.

    `W[n, k] = (table[n, code[n, k]] - zeros[n, g]) * scales[n, g] + sparse[n, k]` with g = k // group_size.

    Attributes:
        codes: uint8 (CPU) or int32 (GPU), in the layout of the device's kernel: see `layout`.
        table: float32 [n, 2**bits], a codebook per channel, or [1, 2**bits].
        scales: float16 or bfloat16, or float32 where neither holds all values; [n/tile, k/group_size, tile] (CPU; tile
            is 16 where all channels share a table, else 4) or [n, k/group_size] (GPU); None for none.
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
    def layout(self) -> Layout:
        """What the tensors are laid out for: "cpu", or on GPUs "tensor cores" or "words" (Triton)."""
        return layout_of(self.codes)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for value in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in pairs if isinstance(value, Tensor)}

    def sparse(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """rows, cols and vals of the sparse part [n, k] of a CPU weight, as `pack` takes them; None for none."""
        if self.rows is None or self.cols is None or self.vals is None:
            return None
        shape = _fallback.shape_of(self.bits, self.k, self.group_size, _fallback.columns_of(self.table))
        return self.rows, _fallback.features_of(self.cols, shape), self.vals

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [n, k]: what the kernels multiply with, before any rounding of theirs.

        Raises:
            ValueError: the weight is packed for a GPU.
        """
        if self.layout != "cpu":
            raise ValueError("packed for a GPU, and only CPU weights can be dequantized. Fix: pack CPU tensors")
        columns = _fallback.columns_of(self.table)
        codes = _fallback.unpack_codes(self.codes, self.bits, self.n, self.k, self.group_size, columns)
        scales, zeros = (None if t is None else _fallback.plain(t, self.n) for t in (self.scales, self.zeros))
        weight = _fallback.decode(codes, self.table, scales, zeros, self.group_size, dtype)
        if (sparse := self.sparse()) is not None:
            rows, feature, values = sparse
            weight.index_put_((_fallback.channels_of(rows), feature), values.to(dtype), accumulate=True)
        return weight


class Linear(torch.nn.Module):
    """A packed weight as a module. Its tensors are buffers that are not in `state_dict()`.

    They stay on their device and keep their dtypes, because each device has its own layout: `.to(device)` raises, and
    `.half()` or `.to(dtype)` leave them as they are, since x may have any dtype. Copies and pickles are as good.
    """

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        for name in TENSORS:
            self.register_buffer(name, getattr(weight, name), persistent=False)
        self.bits, self.n, self.k, self.group_size = weight.bits, weight.n, weight.k, weight.group_size

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        """What `.to()`, `.cuda()`, `.half()` and the like come down to.

        Raises:
            ValueError: it would move the packed tensors to another device.
        """
        for tensor in self.buffers():
            probe = tensor.new_empty(0)
            applied = fn(probe)
            if applied.device.type != probe.device.type:
                raise ValueError(
                    f"{self} is packed for {probe.device.type} and cannot move to {applied.device}, where weights are "
                    "laid out in another way. Fix: move the checkpoint's tensors and pack them again on that device"
                )
            if applied.dtype != probe.dtype:
                return self
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` [..., k] in float32, bfloat16 or float16 to [..., n] of the same dtype."""
        return torch.ops.quantserve_kernels.codebook_linear(x, *tensors_of(self), bias, *numbers_of(self))

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return f"in_features={self.k}, out_features={self.n}, bits={self.bits}, group_size={self.group_size}"


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`x @ W.T + bias`, accumulated in float32.

    Where x holds infinities or NaN, those rows of y are infinite or NaN, on CPUs the same ones at every batch size. On
    GPUs more than 128 rows (a codebook per channel) go through cuBLAS, for which torch's `allow_*_reduced_precision_
    reduction` and TF32 settings count, and a sparse part of the other sign may make NaN of an infinity.

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
    return torch.ops.quantserve_kernels.codebook_linear(x, *tensors_of(weight), bias, *numbers_of(weight))


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
        sparse: (rows, cols, vals) of a CSR matrix [n, k] to add, every position at most once, in any order in a row.

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
    if not (1 <= n < MOST and 1 <= k < MOST):
        raise ValueError(f"a weight [{n}, {k}] has nothing to multiply, or 2^31 rows or columns")
    _fallback.shape_of(bits, k, group_size, columns=False)  # refuses first what `bits` the table has to have
    layout = _layout_for(table.device, bits, k, group_size)
    table = _checked(table, "table", [(n, 2**bits), (1, 2**bits)], torch.float32, table.device)
    columns, tile = _fallback.columns_of(table), _fallback.tile_of(table)
    numbers = _fallback.shape_of(bits, k, group_size, columns)
    if zeros is not None and scales is None:
        raise ValueError("zeros without scales; pass scales of 1")
    if scales is not None:
        dtype = scales.dtype if scales.dtype in SCALE_DTYPES else torch.float32
        scales = _checked(scales, "scales", [(n, numbers.groups)], dtype, table.device)
        if zeros is not None:
            zeros = _checked(zeros, "zeros", [(n, numbers.groups)], dtype, table.device)
        if columns:
            table, scales, zeros = _suited_to_bfloat16(table, scales, zeros)
        scales, zeros = _narrowed(scales, zeros)
    rows, cols, vals = (None, None, None) if sparse is None else _checked_csr(*sparse, table, n, k, numbers, layout)
    _refuse_infinity(table, scales, zeros, vals, layout)
    if scales is not None:
        if layout == "cpu":
            scales = _fallback.interleave(scales, tile)
            zeros = None if zeros is None else _fallback.interleave(zeros, tile)
        elif layout == "tensor cores":  # which take no scales: one a channel makes a codebook a channel
            table = ((table if zeros is None else table - zeros) * scales).contiguous()
            scales = zeros = None
    packed = _packed(_strips(channels, bits, n, k, table.device), bits, n, group_size, layout, columns)
    return PackedWeight(packed, table, scales, zeros, rows, cols, vals, bits, n, k, group_size)


def check_bias(bias: Tensor | None) -> None:
    """Refuse a bias that would make all rows of y infinite or NaN: for loaders, as `linear` reads no values to check.

    Raises:
        ValueError: it holds values that are not finite, perhaps since it was rounded to its dtype.
    """
    if bias is not None:
        _finite(bias, "bias", bias.dtype, bias.device)


def _layout_for(device: torch.device, bits: int, k: int, group_size: int) -> Layout:
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        raise ValueError(f"table is on {device}, and there are kernels for cpu and cuda only. Fix: pass CPU tensors")
    from quantserve_kernels import _cuda

    return "tensor cores" if _cuda.suits(device, bits, k, group_size) else "words"


def _rows_of(codes: Tensor) -> Callable[[int, int], Tensor]:
    return lambda first, last: codes[first:last]


def _strips(
    channels: Callable[[int, int], Tensor], bits: int, n: int, k: int, device: torch.device
) -> Callable[[int], Tensor]:
    """The codes from a channel on, STRIP channels or what is left, checked."""

    def strip(first: int) -> Tensor:
        last = min(first + STRIP, n)
        codes = channels(first, last)
        if codes.dtype != torch.uint8 or tuple(codes.shape) != (last - first, k) or codes.device != device:
            raise ValueError(
                f"codes of channels {first} to {last - 1} are {codes.dtype} {list(codes.shape)} on {codes.device}, "
                f"expected uint8 {[last - first, k]} on {device}, where table is"
            )
        if device.type != "cpu" and int(codes.max()) >= 2**bits:  # the CPU's packer looks itself
            raise ValueError(f"codes go up to {int(codes.max())}, which does not fit {bits} bits (0..{2**bits - 1})")
        return codes.contiguous()

    return strip


def _packed(
    strip: Callable[[int], Tensor], bits: int, n: int, group_size: int, layout: Layout, columns: bool
) -> Tensor:
    """The codes of all strips in one tensor; on a CPU it is filled strip by strip, so nothing exists twice."""
    if layout == "tensor cores":
        from quantserve_kernels import _cuda

        return torch.cat([_cuda.pack_codes(strip(first), bits) for first in range(0, n, STRIP)])
    if layout == "words":
        from quantserve_kernels import _triton

        return torch.cat([_triton.pack_codes(strip(first), bits) for first in range(0, n, STRIP)])
    part = torch.ops.quantserve_kernels.pack_codes(strip(0), bits, group_size, columns)
    if n <= STRIP:
        return part
    size, tile = part.numel(), _fallback.COLUMNS if columns else _fallback.TILE
    whole = allocate_codes(-(-n // tile) * tile * size // STRIP)
    whole[:size] = part
    for first in range(STRIP, n, STRIP):
        part = torch.ops.quantserve_kernels.pack_codes(strip(first), bits, group_size, columns)
        at = first // STRIP * size
        whole[at : at + part.numel()] = part
    return whole


def _checked(
    tensor: Tensor, name: str, shapes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The tensor in the dtype it is kept in, contiguous."""
    if isinstance(tensor, Tensor) and tuple(tensor.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {expected}")
    return _finite(tensor, name, dtype, device)


def _finite(tensor: Tensor, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a tensor")
    if tensor.is_complex():
        raise ValueError(f"{name} is {tensor.dtype}, expected real numbers")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and table on {device}. Fix: have both on one device")
    kept = tensor.detach().to(dtype)
    bad = int((~torch.isfinite(kept)).sum())
    if bad:
        raise ValueError(f"{name} holds {bad} values that are not finite in {str(dtype).removeprefix('torch.')}")
    return kept.contiguous()


def _refuse_infinity(
    table: Tensor, scales: Tensor | None, zeros: Tensor | None, vals: Tensor | None, layout: Layout
) -> None:
    """Refuse what the kernels would round to infinity, so that products with it give NaN in whole rows of y.

    On CPUs the codebook by itself and W become bfloat16, on GPUs W takes the dtype of x, which may be float16.
    """
    low, high = (edge.double()[:, None] for edge in (table.amin(1), table.amax(1)))
    reach = torch.maximum(low.abs(), high.abs())
    kept = float(reach.max()) if layout == "cpu" else 0.0
    if scales is not None:
        zero = 0.0 if zeros is None else zeros.double()
        reach = torch.maximum((low - zero).abs(), (high - zero).abs()) * scales.double().abs()
    added = float(vals.abs().max()) if vals is not None and vals.numel() else 0.0
    largest = max(kept, float(reach.max()) + added)
    name, end = ("bfloat16", BFLOAT16_ENDS) if layout == "cpu" else ("float16", FLOAT16_ENDS)
    if largest >= end:
        raise ValueError(
            f"weights go up to {largest:.4g}, which {name} rounds to infinity (from {end:.5g} on). "
            "Fix: check the checkpoint's scales, codebook and sparse values"
        )


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


def _narrowed(scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same values in 16 bits, where a dtype of 16 bits holds all of them exactly: they are read at every call."""
    if scales.dtype == torch.float32:
        for dtype in (torch.float16, torch.bfloat16):
            narrow = scales.to(dtype), None if zeros is None else zeros.to(dtype)
            pairs = zip(narrow, (scales, zeros), strict=True)
            if all(a is None or b is None or torch.equal(a.to(b.dtype), b) for a, b in pairs):
                return narrow
    return scales, zeros


def _checked_csr(
    rows: Tensor, cols: Tensor, vals: Tensor, table: Tensor, n: int, k: int, shape: _fallback.Shape, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    if rows.shape != (n + 1,):
        raise ValueError(f"rows has shape {list(rows.shape)}, expected [{n + 1}] (out_features + 1)")
    if cols.ndim != 1 or cols.shape != vals.shape:
        raise ValueError(f"cols has shape {list(cols.shape)} and vals {list(vals.shape)}; they must be equal, [nnz]")
    nnz = cols.numel()
    if nnz >= MOST:
        raise ValueError(f"the sparse part has {nnz} entries, expected fewer than 2^31")
    rows, cols = _indices(rows, "rows", table.device), _indices(cols, "cols", table.device)
    vals = _finite(vals, "vals", torch.float32, table.device)
    if int(rows[0]) != 0 or int(rows[-1]) != nnz or bool((rows.diff() < 0).any()):
        raise ValueError(f"rows must rise from 0 to nnz = {nnz}; it goes from {int(rows[0])} to {int(rows[-1])}")
    if nnz and not (int(cols.min()) >= 0 and int(cols.max()) < k):
        raise ValueError(f"cols holds {int(cols.min())}..{int(cols.max())}, expected 0..{k - 1} (in_features {k})")
    channel = torch.repeat_interleave(torch.arange(n, device=rows.device), rows.diff())
    position, order = (channel * k + cols).sort()  # the kernels look columns up
    again = position[1:][position.diff() == 0]
    if again.numel():
        at = int(again[0])
        raise ValueError(
            f"the sparse part gives {again.numel()} positions more than once, first out_feature {at // k}, in_feature "
            f"{at % k}. Fix: add up the values of each position"
        )
    stored = cols[order]
    if layout == "cpu":  # whose kernels read x with every group padded; the GPU's read it as it is
        stored = stored // shape.group * shape.group_padded + stored % shape.group
    return rows.to(torch.int32), stored.to(torch.int32), vals[order]


def _indices(tensor: Tensor, name: str, device: torch.device) -> Tensor:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} is {tensor.dtype}, expected integers")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} and table on {device}. Fix: have both on one device")
    return tensor.to(torch.int64)
