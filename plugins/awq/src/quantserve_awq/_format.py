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


class Rounded(NamedTuple):
    """A weight on its levels.

    Attributes:
        codes: 0..15, float32 [n, groups, group].
        zeros: 0..15, float32 [n, groups, 1].
        scales: float32 [n, groups, 1].
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor

    def weight(self) -> Tensor:
        """The weight, float32 [n, k]."""
        return ((self.codes - self.zeros) * self.scales).flatten(1)

    def packed(self, dtype: torch.dtype) -> PackedLinear:
        """The stored tensors, with scales in a dtype that holds them."""
        return PackedLinear(
            qweight=pack(self.codes.flatten(1).T.to(torch.int32)),
            qzeros=pack(self.zeros.squeeze(-1).T.to(torch.int32)),
            scales=self.scales.squeeze(-1).T.to(dtype).contiguous(),
        )


def rounded(groups: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype) -> Rounded:
    """Round to the nearest of 16 levels between two bounds.

    Args:
        groups: weights, float32 [n, groups, group].
        low: of the levels, at most 0, float32 [n, groups, 1]: the zero point is one of 0..15, so zero is a level.
        high: the same, at least 0.
        dtype: of the stored scales, float16 or bfloat16.
    """
    # Codes are chosen for the rounded scale that is stored, not for the exact one.
    scales = ((high - low).clamp(min=1e-5) / LARGEST).to(dtype).to(torch.float32)
    zeros = (-torch.round(low / scales)).clamp(0, LARGEST)
    return Rounded((torch.round(groups / scales) + zeros).clamp(0, LARGEST), zeros, scales)


def grouped(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [n, k] as float32 [n, groups, group], and the bounds of each group, which include zero.

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
    return groups, groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)


def quantize_linear(weight: Tensor, group_size: int, dtype: torch.dtype = torch.float16) -> PackedLinear:
    """Round a weight [n, k] to the nearest of 16 levels per (n, group of k).

    Args:
        weight: any float dtype; computed in float32.
        group_size: -1 for one group.
        dtype: of the scales, float16 or bfloat16.

    Raises:
        ValueError: see `grouped`.
    """
    return rounded(*grouped(weight, group_size), dtype).packed(dtype)


def dequantize_linear(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """The weight [n, k] in float32 that the three stored tensors mean."""
    codes = unpack(qweight)
    k, n = codes.shape
    group = k // scales.shape[0]
    centred = codes.reshape(-1, group, n) - unpack(qzeros).unsqueeze(1)
    return (centred * scales.to(torch.float32).unsqueeze(1)).reshape(k, n).T.contiguous()
