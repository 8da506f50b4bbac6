"""The linear layer as one torch operator, so that torch.compile and CUDA graphs see a single opaque node.

Plain torch: every call decodes the layer and multiplies. At rest a weight stays packed; one decoded layer at a time is
the peak. Nothing here depends on data or asks the device for a value, so a captured graph stays right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantserve_squeezellm._format import k_multiple, unpack_plane

NAMESPACE = "quantserve_squeezellm"
SCHEMA = "linear(Tensor x, Tensor qweight, Tensor lookup_table, int bits, Tensor positions, Tensor values) -> Tensor"
_library: torch.library.Library | None = None


def plane_positions(n_index: Tensor, k_index: Tensor, n: int, k: int, bits: int) -> Tensor:
    """Where entry (n, k) lies in the flat decoded weight, which is ordered [k % period, k // period, n]."""
    period = k_multiple(bits)
    flat = (k_index % period * (k // period) + k_index // period) * n + n_index
    return flat.to(torch.int32 if n * k < 2**31 else torch.int64)


def linear(x: Tensor, qweight: Tensor, lookup_table: Tensor, bits: int, positions: Tensor, values: Tensor) -> Tensor:
    """`x @ W.T` for x [..., k] of any floating dtype; returns [..., n] of that dtype.

    Args:
        x: activations.
        qweight: int32 [k*bits/32, n].
        lookup_table: float32 [n, 2**bits].
        bits: 3 or 4.
        positions: sparse part: from `plane_positions`, each at most once; empty when there is none.
        values: sparse part: float32, added at `positions`.
    """
    n, entries = lookup_table.shape
    period = k_multiple(bits)
    words = qweight.view(-1, period * bits // 32, n)
    steps = words.shape[0]
    # A CPU multiplies in float32 anyway; accelerators need the activation dtype for their matrix units.
    dtype = torch.float32 if x.device.type == "cpu" else x.dtype
    table = lookup_table.to(dtype).view(-1)
    channel = torch.arange(0, n * entries, entries, dtype=torch.int32, device=x.device)
    weight = torch.empty(period, steps * n, dtype=dtype, device=x.device)
    for j in range(period):
        torch.index_select(table, 0, unpack_plane(words, bits, j).add_(channel).view(-1), out=weight[j])
    if positions.numel():
        weight.view(-1).index_add_(0, positions, values.to(dtype))
    ordered = x.reshape(-1, steps, period).transpose(1, 2).reshape(-1, period * steps).to(dtype)
    return (ordered @ weight.view(period * steps, n)).to(x.dtype).view(*x.shape[:-1], n)


def _fake(x: Tensor, qweight: Tensor, lookup_table: Tensor, bits: int, positions: Tensor, values: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], lookup_table.shape[0]))


def register() -> None:
    """Define `torch.ops.quantserve_squeezellm.linear` once per process."""
    global _library
    if _library is None and not hasattr(getattr(torch.ops, NAMESPACE), "linear"):
        _library = torch.library.Library(NAMESPACE, "FRAGMENT")
        _library.define(SCHEMA)
        _library.impl("linear", linear, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::linear", _fake, lib=_library)
