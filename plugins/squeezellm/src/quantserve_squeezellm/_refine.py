"""Codes and codebooks that keep a linear's outputs: rounding as GPTQ does, then turns as in LNQ."""

from __future__ import annotations

import torch
from torch import Tensor

from quantserve_quantize.hessian import damped, descend, inverse_factor, refit, spread

DAMP = 0.01
"""Added to the correlations' diagonal of ones."""
LEAST = 1e-6
"""Cost of a weight, as a part of the row's mean, at least: one without cost stays near its value."""


def refined(weight: Tensor, cost: Tensor, hessian: Tensor, table: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Lower the error of the outputs, from codebooks that k-means found.

    The Hessian of a row has its costs as diagonal, and the correlations of the inputs: errors e cost
    sum(s[i] e[i] C[i, j] s[j] e[j]), with s[i]^2 = cost[i].

    Args:
        weight: float32 [n, k].
        cost: of a squared error, float32 [n, k]. A row of zeros counts as one of ones.
        hessian: of the inputs, float32 [k, k].
        table: codebooks, float32 [n, entries].
        rounds: turns of codes and codebooks.

    Returns:
        Codebooks float32 [n, entries], in no order, and codes uint8 [n, k].
    """
    mean = cost.mean(1, keepdim=True)
    share = torch.where(mean > 0, cost / mean, 1.0).clamp_min(LEAST).sqrt()
    size = hessian.diagonal().clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
    correlation = damped(hessian * size * size[:, None], DAMP).float()
    scaled, columns = weight * share, share.t().contiguous()
    codes = torch.empty_like(weight, dtype=torch.int64).t().contiguous()

    def rounded(i: int, value: Tensor) -> Tensor:
        codes[i] = ((value / columns[i])[:, None] - table).abs().argmin(1)
        return table.gather(1, codes[i][:, None])[:, 0] * columns[i]

    order = cost.mean(0).argsort(descending=True, stable=True)
    factor = inverse_factor(correlation[order][:, order], 1e-6)
    spread(scaled, factor, order, lambda at, rest: rounded(int(order[at]), rest[0]))
    for _ in range(rounds):
        table = refit(scaled, correlation, codes.t(), share, table)
        descend(scaled, table.gather(1, codes.t()) * share, correlation, lambda at, rest: rounded(at, rest[0]))
    table = refit(scaled, correlation, codes.t(), share, table)
    return table, codes.t().to(torch.uint8)
