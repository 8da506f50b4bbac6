"""The AWQ "GEMM" tensor layout in plain torch: pack, unpack, quantize, dequantize.

One linear with weight ``[n, k]`` (N = out_features, K = in_features) is stored as

    qweight  int32    [k, n / 8]          eight 4-bit codes of consecutive n per word
    qzeros   int32    [k / group, n / 8]  the same packing
    scales   float16 or bfloat16  [k / group, n]

and means ``W[n, k] = (q[k, n] - z[k // group, n]) * scales[k // group, n]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BITS = 4
PER_WORD = 32 // BITS
LARGEST = 2**BITS - 1

# Nibble i (bits 4i to 4i + 3) of a word holds column 8c + ORDER[i].
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SHIFTS = tuple(BITS * ORDER.index(column) for column in range(PER_WORD))


class PackedLinear(NamedTuple):
    """The three stored tensors of one linear."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor


def pack(values: Tensor) -> Tensor:
    """Pack codes 0..15 of shape [rows, n] into int32 words [rows, n / 8]."""
    rows, n = values.shape
    columns = values.to(torch.int64).reshape(rows, n // PER_WORD, PER_WORD)
    words = torch.zeros(rows, n // PER_WORD, dtype=torch.int64, device=values.device)
    for column, shift in enumerate(SHIFTS):
        words |= columns[:, :, column] << shift
    # Two's complement by hand: values above 2**31 do not fit an int32 conversion.
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack(words: Tensor) -> Tensor:
    """Unpack int32 words [rows, n / 8] into codes 0..15, int32 [rows, n]."""
    rows, count = words.shape
    columns = [(words >> shift) & LARGEST for shift in SHIFTS]
    return torch.stack(columns, dim=-1).reshape(rows, count * PER_WORD)


def quantize_linear(weight: Tensor, group_size: int, dtype: torch.dtype = torch.float16) -> PackedLinear:
    """Round a weight [n, k] to the nearest of 16 levels per (n, group of k).

    Args:
        weight: any float dtype; computed in float32.
        group_size: inputs that share a scale and a zero; -1 is all of k.
        dtype: of the scales, float16 or bfloat16.

    Raises:
        ValueError: k is no multiple of the group, or n no multiple of 8.
    """
    n, k = weight.shape
    group = k if group_size == -1 else group_size
    if group < 1 or k % group:
        raise ValueError(f"in_features {k} is not a multiple of group_size {group_size}")
    if n % PER_WORD:
        raise ValueError(f"out_features {n} is not a multiple of {PER_WORD}, the codes in one int32 word")
    groups = weight.to(torch.float32).reshape(n, k // group, group)
    # Zero is always inside the range: the zero point is one of 0..15, so a group of one sign would be clipped.
    low = groups.amin(dim=-1, keepdim=True).clamp(max=0)
    high = groups.amax(dim=-1, keepdim=True).clamp(min=0)
    # Codes are chosen for the rounded scale that is stored, not for the exact one.
    scale = ((high - low).clamp(min=1e-5) / LARGEST).to(dtype)
    step = scale.to(torch.float32)
    zero = (-torch.round(low / step)).clamp(0, LARGEST)
    codes = (torch.round(groups / step) + zero).clamp(0, LARGEST)
    return PackedLinear(
        qweight=pack(codes.reshape(n, k).T.to(torch.int32)),
        qzeros=pack(zero.squeeze(-1).T.to(torch.int32)),
        scales=scale.squeeze(-1).T.contiguous(),
    )


def dequantize_linear(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """The weight [n, k] in float32 that the three stored tensors mean."""
    codes = unpack(qweight)
    k, n = codes.shape
    group = k // scales.shape[0]
    centred = codes.reshape(-1, group, n) - unpack(qzeros).unsqueeze(1)
    return (centred * scales.to(torch.float32).unsqueeze(1)).reshape(k, n).T.contiguous()
