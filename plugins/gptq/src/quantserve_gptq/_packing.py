"""From GPTQ's tensors to the kernels' codes, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from quantserve_kernels import PackedWeight, input_order, pack, unpack_stream


def pack_linear(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, *, bits: int, sym: bool, zero_offset: int
) -> tuple[PackedWeight, Tensor | None]:
    """One linear for the kernels, and the order of its inputs.

    Args:
        qweight: int32 [k * bits / 32, n].
        qzeros: int32 [k / group, n * bits / 32].
        scales: [k / group, n].
        g_idx: int32 [k] or [n, k], the group of each input; None for inputs in order.
        bits: 2, 3, 4 or 8.
        sym: whether every zero is 2 ** (bits - 1), whatever ``qzeros`` holds, as in vLLM's own GPTQ.
        zero_offset: what is added to a stored zero: 1 in version 1 of the format, 0 in version 2.

    Returns:
        The weight, and int64 [k] such that the weight multiplies ``x[..., order]``; None where the inputs are in order.

    Raises:
        ValueError: ``g_idx`` does not give every group the same number of inputs.
    """
    k, n = qweight.shape[0] * 32 // bits, qweight.shape[1]
    group = k // scales.shape[0]
    order = input_order(g_idx, group) if g_idx is not None else None
    middle = 2 ** (bits - 1)

    def codes(first: int, last: int) -> Tensor:
        unpacked = unpack_stream(qweight[:, first:last], bits)
        return unpacked if order is None else unpacked[:, order]

    weight = pack(
        codes,
        torch.arange(2**bits, dtype=torch.float32, device=qweight.device)[None] - (middle if sym else 0),
        bits=bits,
        shape=(n, k),
        scales=scales.t(),
        zeros=None if sym else stored_zeros(qzeros, bits, zero_offset).t().to(scales.dtype),
        group_size=group,
    )
    return weight, order


def stored_zeros(qzeros: Tensor, bits: int, offset: int) -> Tensor:
    """Zeros uint8 [k / group, n] of int32 words [k / group, n * bits / 32].

    Version 1 subtracts 1 from whole words (GPTQModel), so that a zero of 0 borrows from the next field; adding it to
    whole words undoes that. Codes of 3 bits do not end with the words: there the offset is added to each.
    """
    if bits == 3:
        return (unpack_stream(qzeros.t(), bits) + offset) & 7
    words = qzeros + offset * sum(1 << shift for shift in range(0, 32, bits))
    return unpack_stream(words.t(), bits)
