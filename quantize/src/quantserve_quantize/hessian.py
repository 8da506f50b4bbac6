"""What a calibration text tells of the Hessian of a linear, and codes that keep its outputs by that.

The error of the outputs of a row is e H e^T, where e [k] are the errors of its weights. `spread` rounds one input after
the other (GPTQ, arXiv 2210.17323). `descend` and `refit` then lower the error in turns: codes one input at a time, and
the values that codes stand for in closed form (LNQ, arXiv 2505.07004). A row whose errors e * s count, with s [k] of
its own, is given as weight * s, with values * s.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STEADY = 2
"""How much fewer tokens than inputs pull a Hessian towards its diagonal."""
BLOCK = 128
"""Inputs that are rounded before their errors reach the inputs outside the block."""
REFIT_BYTES = 2**28
"""Working memory of `refit`, about."""
RIDGE = 1e-4
"""How far `refit` holds on to the values that it is given, as a part of the mean cost of a value."""

Nearest = Callable[[int, Tensor], Tensor]
"""Position of an input in the order of rounding, and the weights [inputs, n] from there to the end of its block, as
errors changed them -> what stands for the first of them, [n]."""


def steadied(hessian: Tensor, tokens: int | None) -> Tensor:
    """H as far as so many tokens tell it: what is not on the diagonal times tokens / (tokens + STEADY * k).

    Few tokens correlate inputs by chance, and another text correlates others; codes would fit both.

    Args:
        hessian: the mean of x x^T, float32 [k, k].
        tokens: of the mean; None leaves it as it is.
    """
    share = 1 / (1 + STEADY * len(hessian) / tokens) if tokens else 1.0
    return share * hessian + torch.diag((1 - share) * hessian.diagonal())


def damped(hessian: Tensor, damp: float) -> Tensor:
    """H with `damp` times the mean of its diagonal added to it, float64; an input that is always zero gets the mean."""
    out = hessian.double()
    diagonal = out.diagonal().clone()
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean
    out.diagonal().copy_(diagonal + damp * mean)
    return out


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """The upper triangular U, float32 [k, k], with H^-1 = U^T U, of the damped Hessian.

    1 / U[i, i]^2 is what a squared error of input i costs when all inputs behind it make up for it.
    """
    while True:
        # The Cholesky factor of H in reverse order is one of H from the other side, and its inverse is U.
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, damp).flip(0, 1))
        if not failed:
            break
        damp *= 10  # the float32 sums of the calibration are not quite positive
    return torch.linalg.solve_triangular(
        lower.flip(0, 1), torch.eye(len(hessian), dtype=torch.float64), upper=True
    ).float()


def spread(weight: Tensor, factor: Tensor, order: Tensor, nearest: Nearest) -> None:
    """Round input after input, and let those that follow make up for the error of each.

    Args:
        weight: float32 [n, k].
        factor: `inverse_factor` of the Hessian in that order.
        order: int64 [k], the inputs in the order of rounding.
        nearest: rounds; it keeps the codes.
    """
    left = weight.t()[order].contiguous()  # [k, n]: what one input needs lies together
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        part, own = left[start:end], factor[start:end, start:end]
        errors = torch.empty_like(part)
        for i in range(end - start):
            errors[i] = (part[i] - nearest(start + i, part[i:])) / own[i, i]
            part[i + 1 :].addr_(own[i, i + 1 :], errors[i], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)


def descend(weight: Tensor, found: Tensor, hessian: Tensor, nearest: Nearest) -> None:
    """One pass over the inputs: each gets what is best while all others stay.

    Args:
        weight: float32 [n, k].
        found: what stands for it, float32 [n, k].
        hessian: float32 [k, k].
        nearest: rounds, with inputs in their own order; it keeps the codes.
    """
    before = found.t().contiguous()
    slope = hessian @ (before - weight.t())
    diagonal = hessian.diagonal()
    for start in range(0, len(slope), BLOCK):
        end = min(start + BLOCK, len(slope))
        part, own = slope[start:end], hessian[start:end, start:end]
        moves = torch.empty_like(part)
        for i in range(end - start):
            at = start + i
            if not diagonal[at] > 0:
                moves[i] = 0.0
                continue
            moves[i] = nearest(at, (before[at] - part[i] / diagonal[at])[None]) - before[at]
            part.addr_(own[:, i], moves[i])
        slope[end:].addmm_(hessian[end:, start:end], moves)


def refit(weight: Tensor, hessian: Tensor, index: Tensor, share: Tensor, values: Tensor) -> Tensor:
    """The values with the least error, where input j of row r stands for share[r, j] * values[r, index[r, j]].

    Args:
        weight: float32 [n, k].
        hessian: float32 [k, k].
        index: int64 [n, k].
        share: float32 [n, k].
        values: float32 [n, m], those to begin with; one that nothing stands for stays.

    Returns:
        float32 [n, m].
    """
    (n, k), m = weight.shape, values.shape[1]
    out = torch.empty_like(values)
    step = max(1, REFIT_BYTES // (k * m * 12))
    for start in range(0, n, step):
        rows = slice(start, start + step)
        old, at, part = values[rows], index[rows], share[rows]
        basis = torch.zeros(len(old), k, m).scatter_(2, at[:, :, None], part[:, :, None])
        through = (hessian @ basis.transpose(0, 1).reshape(k, -1)).view(k, -1, m).transpose(0, 1)
        cost = (basis.transpose(1, 2) @ through).double()
        error = weight[rows] - part * old.gather(1, at)
        wanted = (error[:, None] @ through)[:, 0].double()
        diagonal = cost.diagonal(dim1=1, dim2=2)
        ridge = RIDGE * diagonal.mean(1, keepdim=True)
        diagonal.add_(torch.where(ridge > 0, ridge, 1.0))
        out[rows] = old + torch.linalg.solve(cost, wanted).float()
    return out
