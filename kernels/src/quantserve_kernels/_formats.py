"""From checkpoint tensors to packed weights, one function per format. N = out_features, K = in_features."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch
from torch import Tensor

from quantserve_kernels._weight import BITS, PackedWeight, pack

# Column 8c + AWQ_ORDER[i] of an AWQ matrix is nibble i of word c (AutoAWQ, "gemm" layout).
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# The 16 values of NF4 (QLoRA, arXiv 2305.14314, appendix E): quantiles of a normal distribution, scaled to [-1, 1].
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# FP4 E2M1 (OCP Microscaling Formats 1.0, table 5): bit 3 is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def unpack_stream(words: Tensor, bits: int) -> Tensor:
    """Codes uint8 [n, k] from int32 words [k*bits/32, n]: per column one little-endian bit stream over k.

    SqueezeLLM and GPTQ store their weights so. 2, 3, 4 or 8 bits.

    Raises:
        ValueError: wrong dtype, or rows that do not make whole codes.
    """
    _expect_words(words, "words")
    n = words.shape[1]
    if bits in (4, 8):  # codes are nibbles or bytes of the words' bytes
        octets = _octets(words).view(-1, n, 4)
        if bits == 4:
            octets = torch.stack((octets & 15, octets >> 4), dim=-1)
        return octets.transpose(0, 1).reshape(n, -1)
    if bits * (words.shape[0] // bits) != words.shape[0]:
        raise ValueError(f"{words.shape[0]} rows of words hold no whole number of 32 codes of {bits} bits")
    runs = words.view(-1, bits, n)
    planes = []
    for j in range(32):
        word, shift = divmod(j * bits, 32)
        code = runs[:, word] >> shift
        if shift + bits > 32:  # the code goes on in the next word
            low = 32 - shift
            code = code & (2**low - 1) | runs[:, word + 1] << low
        planes.append((code & (2**bits - 1)).to(torch.uint8))
    return torch.stack(planes, dim=1).permute(2, 0, 1).reshape(n, -1)


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """int32 words [k*bits/32, n] of codes [n, k]; the inverse of `unpack_stream`.

    Raises:
        ValueError: the codes do not fill whole words, or one needs more bits.
    """
    n, k = codes.shape
    period = 32 // gcd(bits, 32)  # codes that end with a word
    if k % period:
        raise ValueError(f"{k} codes of {bits} bits do not fill whole words; K must be a multiple of {period}")
    if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < 2**bits):
        raise ValueError(f"codes {int(codes.min())}..{int(codes.max())} do not fit {bits} bits (0..{2**bits - 1})")
    groups = codes.t().reshape(k // period, period, n).to(torch.int64)
    words = torch.zeros(k // period, period * bits // 32, n, dtype=torch.int64, device=codes.device)
    for j in range(period):
        word, shift = divmod(j * bits, 32)
        words[:, word] |= groups[:, j] << shift & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, word + 1] |= groups[:, j] >> (32 - shift)
    words = words.reshape(-1, n)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def from_squeezellm(
    qweight: Tensor, lookup_table: Tensor, sparse: tuple[Tensor, Tensor, Tensor] | None = None
) -> PackedWeight:
    """SqueezeLLM (arXiv 2306.07629): a codebook per output channel and perhaps a sparse part.

    Args:
        qweight: int32 [k*bits/32, n].
        lookup_table: [n, 2**bits]; its width gives the bits, 2, 3, 4 or 8.
        sparse: rows, cols, vals of a CSR matrix [n, k].

    Raises:
        ValueError: the tensors do not fit each other.
    """
    _expect_words(qweight, "qweight")
    bits = {4: 2, 8: 3, 16: 4, 256: 8}.get(lookup_table.shape[-1])
    if bits is None:
        raise ValueError(f"lookup_table has {lookup_table.shape[-1]} entries per channel; known: 4, 8, 16, 256")
    k, n = qweight.shape[0] * 32 // bits, qweight.shape[1]
    return pack(_stream(qweight, bits), lookup_table, bits=bits, shape=(n, k), sparse=sparse)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> PackedWeight:
    """AWQ (arXiv 2306.00978) as AutoAWQ stores it, version "gemm", 4 bits.

    Args:
        qweight: int32 [k, n/8].
        qzeros: int32 [k/group, n/8].
        scales: [k/group, n], float16 or bfloat16.

    Raises:
        ValueError: the tensors do not fit each other.
    """
    _expect_words(qweight, "qweight")
    _expect_words(qzeros, "qzeros")
    k, n = qweight.shape[0], qweight.shape[1] * 8
    group = _group(scales, k, n)
    if qzeros.shape != (scales.shape[0], n // 8):
        raise ValueError(f"qzeros has shape {list(qzeros.shape)}, expected {[scales.shape[0], n // 8]}")

    def channels(first: int, last: int) -> Tensor:
        return _awq_columns(qweight[:, first // 8 : last // 8]).t()

    return pack(
        channels,
        _integers(4, qweight),
        bits=4,
        shape=(n, k),
        scales=scales.t(),
        zeros=_awq_columns(qzeros).t().to(scales.dtype),
        group_size=group,
    )


def from_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, *, bits: int, zero_offset: int = 1, g_idx: Tensor | None = None
) -> PackedWeight:
    """GPTQ (arXiv 2210.17323) as AutoGPTQ stores it.

    Args:
        qweight: int32 [k*bits/32, n].
        qzeros: int32 [k/group, n*bits/32], a bit stream along n.
        scales: [k/group, n].
        bits: 2, 3, 4 or 8.
        zero_offset: what is added to a stored zero: 1 in version 1 of the format, 0 in version 2.
        g_idx: int32 [k], the group of each input feature; must be the plain order (no act-order).

    Raises:
        ValueError: the tensors do not fit each other, or the model was quantized with act-order, which permutes x.
    """
    _expect_words(qweight, "qweight")
    _expect_words(qzeros, "qzeros")
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; known: 2, 3, 4, 8")
    k, n = qweight.shape[0] * 32 // bits, qweight.shape[1]
    group = _group(scales, k, n)
    if g_idx is not None and not torch.equal(g_idx.cpu().long(), torch.arange(k) // group):
        raise ValueError("g_idx is not in order: quantized with act-order (desc_act), which this kernel does not serve")
    zeros = unpack_stream(qzeros.t(), bits)  # [k/group, n]
    if zeros.shape != scales.shape:
        raise ValueError(f"qzeros has shape {list(qzeros.shape)}, expected {[scales.shape[0], n * bits // 32]}")
    return pack(
        _stream(qweight, bits),
        _integers(bits, qweight),
        bits=bits,
        shape=(n, k),
        scales=scales.t(),
        zeros=zeros.t().to(scales.dtype) + zero_offset,
        group_size=group,
    )


def from_nf4(packed: Tensor, absmax: Tensor, shape: tuple[int, int], table: Tensor | None = None) -> PackedWeight:
    """NF4 or FP4 blocks as bitsandbytes stores them: two codes a byte, the first in the high nibble, row by row.

    Args:
        packed: uint8, n*k/2 bytes in any shape.
        absmax: float [n*k/block], the largest magnitude of each block (already dequantized, if it was itself).
        shape: (n, k); the block size must divide k.
        table: 16 values of the codebook; NF4's when None.

    Raises:
        ValueError: the tensors do not fit each other.
    """
    n, k = shape
    if packed.dtype != torch.uint8 or packed.numel() * 2 != n * k:
        raise ValueError(f"packed is {packed.dtype} with {packed.numel()} bytes, expected uint8 with {n * k / 2:g}")
    if absmax.numel() < 1 or (n * k) % absmax.numel() or k % (n * k // absmax.numel()):
        raise ValueError(f"absmax has {absmax.numel()} blocks, which do not divide rows of {k}")
    octets = packed.reshape(n, k // 2)

    def channels(first: int, last: int) -> Tensor:
        part = octets[first:last]
        return torch.stack((part >> 4, part & 15), dim=-1).reshape(last - first, k)

    values = torch.tensor(NF4, dtype=torch.float32, device=packed.device) if table is None else table.reshape(-1)
    return pack(
        channels,
        values[None],
        bits=4,
        shape=shape,
        scales=absmax.reshape(n, -1),
        group_size=n * k // absmax.numel(),
    )


def from_fp8(weight: Tensor, scales: Tensor, block: tuple[int, int] | None = None) -> PackedWeight:
    """FP8 E4M3 or E5M2 (arXiv 2209.05433), each value a code of a table of all 256.

    Args:
        weight: float8_e4m3fn or float8_e5m2 [n, k].
        scales: float [1] or [n] (a scale for all, or for each out_feature, in any shape); with `block`
            [ceil(n/rows), ceil(k/columns)].
        block: (rows, columns) that share a scale; None for whole rows.

    Raises:
        ValueError: the tensors do not fit each other, or the weight holds NaN or infinity.
    """
    if weight.ndim != 2 or weight.dtype not in FP8:
        raise ValueError(f"weight is {weight.dtype} {list(weight.shape)}, expected float8_e4m3fn or _e5m2 [n, k]")
    n, k = weight.shape
    values = torch.arange(256, dtype=torch.uint8, device=weight.device).view(weight.dtype).float()
    first_not_finite = int((~values.isfinite()).nonzero()[0])  # magnitudes from it on are infinity and NaN
    octets = weight.view(torch.uint8)

    def channels(first: int, last: int) -> Tensor:
        codes = octets[first:last]
        if lost := int(((codes & 127) >= first_not_finite).sum()):
            raise ValueError(f"weight holds {lost} NaN or infinities in out_features {first} to {last - 1}")
        return codes

    if block is None:
        if scales.numel() not in (1, n):
            raise ValueError(f"scales has shape {list(scales.shape)}, expected one, or one for each of {n} rows")
        group, scales = k, scales.reshape(-1, 1).expand(n, 1)
    else:
        rows, columns = block
        expected = [-(-n // rows), -(-k // columns)]
        if list(scales.shape) != expected:
            raise ValueError(f"scales has shape {list(scales.shape)}, expected {expected} of {rows} x {columns} blocks")
        group = gcd(k, columns)  # the last block may be narrower
        scales = scales.repeat_interleave(columns // group, 1)[:, : k // group].repeat_interleave(rows, 0)[:n]
    # No weight has the codes that are not finite. With E4M3's as the numbers that follow, the table can be computed.
    table = values.nan_to_num(0.0, 0.0, 0.0)
    if weight.dtype == torch.float8_e4m3fn:
        table[[127, 255]] = torch.tensor([480.0, -480.0], dtype=torch.float32, device=weight.device)
    return pack(channels, table[None], bits=8, shape=(n, k), scales=scales.float(), group_size=group)


def from_fp4(packed: Tensor, scales: Tensor) -> PackedWeight:
    """FP4 E2M1 with a scale for each group along K, as in MXFP4 (groups of 32) and NVFP4 (groups of 16).

    Args:
        packed: uint8 [n, k/2], the first of two inputs in the low nibble.
        scales: float [n, k/group], global scales multiplied in.

    Raises:
        ValueError: the tensors do not fit each other.
    """
    if packed.ndim != 2 or packed.dtype != torch.uint8:
        raise ValueError(f"packed is {packed.dtype} {list(packed.shape)}, expected uint8 [n, k/2]")
    n, k = packed.shape[0], packed.shape[1] * 2
    group = _group(scales.t(), k, n)

    def channels(first: int, last: int) -> Tensor:
        part = packed[first:last]
        return torch.stack((part & 15, part >> 4), dim=-1).reshape(last - first, k)

    table = torch.tensor(E2M1, dtype=torch.float32, device=packed.device)[None]
    return pack(channels, table, bits=4, shape=(n, k), scales=scales, group_size=group)


def input_order(g_idx: Tensor, group: int) -> Tensor | None:
    """int64 [k]: inputs sorted by group; None where they are in order.

    Args:
        g_idx: int32 [k], the group of each input, or [n, k] with one row for each out_feature; of one rank's inputs
            where K is divided between ranks.
        group: inputs of a group.

    Raises:
        ValueError: a group has another number of inputs, or rows differ.
    """
    if g_idx.ndim == 2:
        if not bool((g_idx == g_idx[:1]).all()):
            raise ValueError("the modules of this fused layer have inputs in different orders (g_idx)")
        g_idx = g_idx[0]
    groups = g_idx.to(torch.int64) - int(g_idx.min())
    k = len(groups)
    if torch.equal(groups, torch.arange(k, device=groups.device) // group):
        return None
    counts = torch.bincount(groups)
    if len(counts) != k // group or not bool((counts == group).all()):
        raise ValueError(
            f"g_idx gives {len(counts)} groups {int(counts.min())} to {int(counts.max())} inputs, expected "
            f"{k // group} groups of {group}. With act-order groups are scattered over all inputs, which "
            "ranks cannot divide: serve it with tensor_parallel_size 1"
        )
    return torch.argsort(groups, stable=True)


def _stream(words: Tensor, bits: int) -> Callable[[int, int], Tensor]:
    return lambda first, last: unpack_stream(words[:, first:last], bits)


def _integers(bits: int, like: Tensor) -> Tensor:
    return torch.arange(2**bits, dtype=torch.float32, device=like.device)[None]


def _octets(words: Tensor) -> Tensor:
    # A dimension of 1 may have any stride in a contiguous tensor, but none but 1 in one that is seen as bytes.
    return torch.empty(words.shape, dtype=words.dtype, device=words.device).copy_(words).view(torch.uint8)


def _awq_columns(words: Tensor) -> Tensor:
    """uint8 [rows, n] from AWQ words [rows, n/8]."""
    octets = _octets(words).view(words.shape[0], -1, 4)
    nibbles = torch.stack((octets & 15, octets >> 4), dim=-1).view(words.shape[0], -1, 8)
    order = torch.tensor([AWQ_ORDER.index(column) for column in range(8)], device=words.device)
    return nibbles[:, :, order].reshape(words.shape[0], -1)


def _group(scales: Tensor, k: int, n: int) -> int:
    if scales.ndim != 2 or scales.shape[1] != n or scales.shape[0] < 1 or k % scales.shape[0]:
        raise ValueError(f"scales has shape {list(scales.shape)}, expected [k / group_size, n] with k {k} and n {n}")
    return k // scales.shape[0]


def _expect_words(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a tensor")
    if tensor.dtype != torch.int32 or tensor.ndim != 2:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected two dimensions of int32 words")
