"""Mixtures of experts on CPUs: a layer's experts are one packed weight, and one call serves all tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantserve_kernels import _fallback
from quantserve_kernels._arguments import numbers_of, tensors_of
from quantserve_kernels._fallback import ACTIVATIONS, tile_of
from quantserve_kernels._ops import allocate_codes
from quantserve_kernels._weight import PackedWeight, pack

__all__ = ["ACTIVATIONS", "concatenate", "experts"]


def experts(
    x: Tensor,
    w13: PackedWeight,
    w2: PackedWeight,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: str = "silu",
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
) -> Tensor:
    """`sum over j of topk_weights[t, j] * W2[e] @ act(W13[e] @ x[t])` with e = topk_ids[t, j], summed in float32.

    Tokens are sorted by expert, so the weights of an expert are read once for all of them. A token may name an expert
    more than once. The number of threads changes no result.

    Args:
        x: [tokens, k], float32, bfloat16 or float16, on a CPU.
        w13: W13 [2 * i, k] of all experts, one below the other: [experts * 2 * i, k], as `concatenate` makes it.
        w2: W2 [k, i] of all experts: [experts * k, i].
        topk_ids: int32 or int64 [tokens, choices], each 0 to experts - 1, or -1 for an expert that another rank has.
        topk_weights: float32 [tokens, choices].
        activation: of h [2 * i] = W13 @ x + w13_bias, with gate = h[:i] and up = h[i:], as vLLM names and defines it.

            - ``silu``: silu(gate) * up
            - ``gelu``, ``gelu_tanh``: gelu(gate) * up, exact or by tanh
            - ``swigluoai``: gate = h[::2], up = h[1::2] (gpt-oss); g = min(gate, 7); g * sigmoid(1.702 * g) times
              clamp(up, -7, 7) + 1
        w13_bias: [experts, 2 * i], or None. Float32 is read in place; other dtypes are converted at every call.
        w2_bias: [experts, k], or None; the same.

    Returns:
        [tokens, k] in x's dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or ids that do not fit, with the numbers.
    """
    for name, weight in (("w13", w13), ("w2", w2)):
        if weight.layout != "cpu":
            raise ValueError(
                f"{name} is packed for a GPU, and experts are computed on CPUs only. Fix: pack CPU tensors"
            )
    return torch.ops.quantserve_kernels.codebook_experts(
        x,
        topk_ids,
        topk_weights,
        activation,
        *tensors_of(w13),
        w13_bias,
        *tensors_of(w2),
        w2_bias,
        *numbers_of(w13),
        *numbers_of(w2),
    )


def concatenate(weights: Sequence[PackedWeight]) -> PackedWeight:
    """CPU weights [n, k] one below the other, [sum of n, k]: the experts of a layer, or gate and up of every expert.

    Args:
        weights: at least one, alike in k, bits, group size and which tensors they have (a sparse part may be missing),
            each with n a multiple of 16 where its channels share a table, else of 4. Where weights have different
            tables, each channel of the result has one of its own.

    Raises:
        ValueError: they are not; says which and how.
    """
    if not weights:
        raise ValueError("no weights to concatenate")
    first = weights[0]
    for at, weight in enumerate(weights):
        if _kind(weight) != _kind(first):
            raise ValueError(f"weight {at} has {_kind(weight)} and weight 0 {_kind(first)}; they must be alike")
        if weight.layout != "cpu" or weight.n % tile_of(weight.table):
            raise ValueError(
                f"weight {at} is [{weight.n}, {weight.k}] in the layout {weight.layout}, expected the CPU's and n a "
                f"multiple of {tile_of(weight.table)}"
            )
    table = first.table
    if any(weight.table.shape[0] > 1 or not torch.equal(weight.table, table) for weight in weights):
        weights = [_with_a_table_per_channel(weight) for weight in weights]
        table = torch.cat([weight.table for weight in weights])
    codes = [weight.codes for weight in weights]
    rows, cols, vals = _concatenated_csr(weights)
    return PackedWeight(
        codes=torch.cat(codes, out=allocate_codes(sum(part.numel() for part in codes))),
        table=table,
        scales=_concatenated([weight.scales for weight in weights]),
        zeros=_concatenated([weight.zeros for weight in weights]),
        rows=rows,
        cols=cols,
        vals=vals,
        bits=first.bits,
        n=sum(weight.n for weight in weights),
        k=first.k,
        group_size=first.group_size,
    )


def _kind(weight: PackedWeight) -> str:
    """What weights must share to be one, in words. Scales of different dtypes take the one that holds all."""
    there = {"scales": weight.scales, "zeros": weight.zeros}
    scales, zeros = (name if tensor is not None else f"no {name}" for name, tensor in there.items())
    return f"k {weight.k}, {weight.bits} bits, group size {weight.group_size}, {scales}, {zeros}"


def _with_a_table_per_channel(weight: PackedWeight) -> PackedWeight:
    if weight.table.shape[0] > 1:
        return weight
    codes = _fallback.unpack_codes(weight.codes, weight.bits, weight.n, weight.k, weight.group_size, columns=True)
    scales, zeros = (None if t is None else _fallback.plain(t, weight.n) for t in (weight.scales, weight.zeros))
    return pack(
        codes,
        weight.table.expand(weight.n, -1),
        bits=weight.bits,
        scales=scales,
        zeros=zeros,
        group_size=weight.group_size,
        sparse=weight.sparse(),
    )


def _concatenated(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def _concatenated_csr(weights: Sequence[PackedWeight]) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
    if all(weight.rows is None for weight in weights):
        return None, None, None
    zero = torch.zeros(1, dtype=torch.int32)
    counts = [zero.expand(weight.n) if weight.rows is None else weight.rows.diff() for weight in weights]
    rows = torch.cat([zero, *counts]).cumsum(0)
    if int(rows[-1]) >= 2**31:
        raise ValueError(f"the sparse parts have {int(rows[-1])} entries, expected fewer than 2^31")
    cols, vals = (_concatenated([getattr(weight, name) for weight in weights]) for name in ("cols", "vals"))
    assert cols is not None
    assert vals is not None
    return rows.to(torch.int32), cols, vals
