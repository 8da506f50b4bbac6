"""Codes that keep the outputs, against least squares and against every other choice."""

from __future__ import annotations

from itertools import pairwise

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor

from quantserve_quantize.hessian import damped, descend, refit

N, K, M = 6, 160, 4


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A weight, a Hessian of inputs that are sums of a few, and codes, shares and values to begin with."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(900, 30, generator=made) @ torch.randn(30, K, generator=made)
    x += torch.randn(900, K, generator=made)
    weight, share = torch.randn(N, K, generator=made), torch.rand(N, K, generator=made) + 0.5
    values = torch.randn(N, M, generator=made)
    codes = (weight[:, :, None] - (share[:, :, None] * values[:, None])).abs().argmin(2)
    return weight, x.t() @ x / len(x), codes, share, values


def loss(weight: Tensor, found: Tensor, hessian: Tensor) -> Tensor:
    """The error of the outputs of each row, in float64."""
    error = (weight - found).double()
    return (error @ hessian.double() * error).sum(1)


def test_refit_is_least_squares() -> None:
    weight, hessian, codes, share, values = problem()
    codes[2] = codes[2].clamp(max=M - 2)  # nothing stands for the last value of this row
    found = refit(weight, hessian, codes, share, values)
    root = torch.linalg.cholesky(damped(hessian, 1e-9)).t()
    for row in range(N):
        used = codes[row].unique()
        basis = torch.nn.functional.one_hot(codes[row], M)[:, used].double() * share[row, :, None].double()
        best = torch.linalg.lstsq(root @ basis, root @ weight[row].double()).solution
        assert torch.allclose(found[row, used].double(), best, rtol=0.01, atol=0.01)
    assert found[2, -1] == values[2, -1]
    before, after = (loss(weight, share * one.gather(1, codes), hessian) for one in (values, found))
    assert bool((after < before).all())


def test_descent_leaves_no_better_code_of_one_input() -> None:
    weight, hessian, codes, share, values = problem()
    columns = codes.t().contiguous()

    def nearest(at: int, rest: Tensor) -> Tensor:
        levels = share[:, at, None] * values
        columns[at] = (rest[0][:, None] - levels).abs().argmin(1)
        return levels.gather(1, columns[at][:, None])[:, 0]

    found = share * values.gather(1, codes)
    losses = [loss(weight, found, hessian).sum()]
    for _ in range(40):
        descend(weight, found, hessian, nearest)
        found = share * values.gather(1, columns.t())
        losses.append(loss(weight, found, hessian).sum())
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]
    for at in (0, 77, 128, K - 1):
        for code in range(M):
            other = found.clone()
            other[:, at] = share[:, at] * values[:, code]
            assert bool((loss(weight, found, hessian) <= loss(weight, other, hessian) * (1 + 1e-5)).all())
