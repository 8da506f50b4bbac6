"""GPTQ (arXiv 2210.17323): weights rounded one input after the other, each error spread over the inputs that follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantserve_quantize.hessian import BLOCK, inverse_factor, spread

SMALLEST, LARGEST = 2.0**-24, 65280.0
"""Of the positive numbers that float16 and bfloat16 both have."""
SHRINKS = torch.linspace(0.7, 1.12, 15)
"""Parts of the range of a group's weights among which the search takes the one with the smallest error."""


@dataclass(frozen=True)
class Grid:
    """Scales and zeros of groups, float32 [n, groups]: a weight is (code - zero) * scale."""

    scales: Tensor
    zeros: Tensor


Fit = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Weights [n, group] and the cost of a squared error of each input [group] -> scales and zeros, [n]."""


def rounded(
    weight: Tensor, hessian: Tensor, group: int, bits: int, fit: Fit, damp: float, act_order: str
) -> tuple[Tensor, Grid, Tensor]:
    """Round a weight so that its outputs change little.

    Args:
        weight: float32 [n, k].
        hessian: float32 [k, k], the mean of x x^T.
        group: inputs that share a scale; divides k.
        bits: of a code.
        fit: finds scale and zero of a group.
        damp: what is added to the diagonal of the Hessian, as a part of its mean.
        act_order: ``off``; ``static``: inputs with the largest mean square first, groups of neighbours; ``on``: groups
            of inputs in that order, too.

    Returns:
        Codes uint8 [n, k] in the order of the inputs, the groups' grid, and int64 [k], the group of each input.
    """
    n, k = weight.shape
    order = torch.arange(k) if act_order == "off" else hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], damp)
    cost = factor.diagonal() ** -2
    group_of = (order if act_order == "static" else torch.arange(k)) // group
    grid = Grid(torch.empty(k // group, n), torch.empty(k // group, n))
    ahead = act_order == "static" or group > BLOCK
    for index in range(k // group if ahead else 0):
        members = group_of == index
        grid.scales[index], grid.zeros[index] = fit(weight[:, order[members]], cost[members])
    codes = torch.empty(k, n, dtype=torch.uint8)

    def nearest(at: int, rest: Tensor) -> Tensor:
        index = int(group_of[at])
        if not ahead and at % group == 0:
            grid.scales[index], grid.zeros[index] = fit(rest[:group].t(), cost[at : at + group])
        scale, zero = grid.scales[index], grid.zeros[index]
        code = (rest[0] / scale).add_(zero).round_().clamp_(0, 2**bits - 1)
        codes[order[at]] = code.to(torch.uint8)
        return (code - zero) * scale

    spread(weight, factor, order, nearest)
    groups = torch.empty(k, dtype=torch.int64)
    groups[order] = group_of
    return codes.t(), Grid(grid.scales.t(), grid.zeros.t()), groups


def storable(scales: Tensor) -> Tensor:
    """The nearest scales that float16 and bfloat16 both hold, never 0: engines of both read the same weights."""
    size = scales.abs().clamp(SMALLEST, LARGEST).half().bfloat16().float()
    return torch.where(scales < 0, -size, size)


def symmetric(bits: int, search: bool) -> Fit:
    """Zeros in the middle; the largest weight gets code 0, by a negative scale where it is positive."""
    middle = 2 ** (bits - 1)

    def fit(weights: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        zeros = torch.full((len(weights),), float(middle))
        largest = weights.gather(1, weights.abs().argmax(1, keepdim=True))[:, 0]
        widest = torch.where(largest == 0, 1.0, -largest / middle)
        if not search:
            return storable(widest), zeros
        return best(weights, cost, bits, [(sign * part * widest, zeros) for part in SHRINKS for sign in (1, -1)])

    return fit


def asymmetric(bits: int, search: bool) -> Fit:
    """Zeros are whole numbers from 1 on: files of version 1 store them minus 1, and tools differ about -1."""
    last = 2**bits - 1

    def fit(weights: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        low, high = weights.amin(1).clamp(max=0), weights.amax(1).clamp(min=0)
        widest = torch.where(high > low, (high - low) / last, 1.0)

        def grid(part: Tensor | float) -> tuple[Tensor, Tensor]:
            return widest * part, (-low / widest).round().clamp(1, last)

        if not search:
            scales, zeros = grid(1.0)
            return storable(scales), zeros
        return best(weights, cost, bits, [grid(part) for part in SHRINKS])

    return fit


def best(weights: Tensor, cost: Tensor, bits: int, grids: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The scales and zeros with the smallest error for each row, each squared error times its cost."""
    chosen: tuple[Tensor, Tensor] | None = None
    least = torch.empty(0)
    for scales, zeros in ((storable(scales), zeros) for scales, zeros in grids):
        codes = (weights / scales[:, None] + zeros[:, None]).round().clamp(0, 2**bits - 1)
        errors = (weights - (codes - zeros[:, None]) * scales[:, None]).square() @ cost
        if chosen is None:
            chosen, least = (scales, zeros), errors
            continue
        better = errors < least
        chosen = torch.where(better, scales, chosen[0]), torch.where(better, zeros, chosen[1])
        least = torch.where(better, errors, least)
    assert chosen is not None
    return chosen
