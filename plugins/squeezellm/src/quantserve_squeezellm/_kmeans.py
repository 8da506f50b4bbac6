"""Exact Lloyd iterations of weighted 1-D k-means, for many channels at once.

On a sorted row a cluster is a range, so prefix sums give means and costs without touching the weights again: an
iteration costs O(clusters * log K) per channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 50


def codebooks(rows: Tensor, clusters: int, weights: Tensor | None = None) -> Tensor:
    """Codebooks float32 [n, clusters], ascending, minimising sum(weights * (rows - nearest)**2) per row of [n, k].

    Deterministic. The start spreads entries as the cube root of the weights' density, which is the optimum for many
    entries; from there Lloyd iterations settle in a few steps. A row with at most `clusters` different values gets
    exactly these values. A row whose weights are all zero counts as unweighted.
    """
    values, order = rows.to(torch.float64).sort(dim=1, stable=True)
    mass = torch.ones_like(values) if weights is None else weights.to(torch.float64).gather(1, order)
    mass = torch.where(mass.sum(1, keepdim=True) > 0, mass, 1.0)
    # Between neighbours the density is mass / gap, so gap * density**(1/3) is what the interval should get.
    between = (mass[:, 1:] + mass[:, :-1]) / 2
    share = torch.nn.functional.pad((values.diff(dim=1) ** 2 * between) ** (1 / 3), (1, 0)).cumsum(1)
    steps = (torch.arange(clusters, dtype=torch.float64) + 0.5) / clusters
    start = torch.searchsorted(share, (share[:, -1:] * steps).contiguous()).clamp_(max=values.shape[1] - 1)
    centres = _lloyd(values, mass, values.gather(1, start))
    return _exact_when_few(values, centres).to(torch.float32)


def encode(rows: Tensor, table: Tensor) -> Tensor:
    """Index uint8 [n, k] of the nearest entry of each row's ascending codebook [n, clusters]."""
    borders = (table[:, 1:].to(torch.float64) + table[:, :-1].to(torch.float64)) / 2
    return torch.searchsorted(borders.contiguous(), rows.to(torch.float64).contiguous()).to(torch.uint8)


def _edges(values: Tensor, centres: Tensor) -> Tensor:
    """Where each cluster begins in the sorted rows, and where the last one ends: [n, clusters + 1]."""
    borders = (centres[:, 1:] + centres[:, :-1]) / 2
    inner = torch.searchsorted(values, borders.contiguous())
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=values.shape[1])


def _lloyd(values: Tensor, mass: Tensor, centres: Tensor) -> Tensor:
    """Move each centre to the mean of the values nearest to it, until none changes its values."""
    masses = torch.nn.functional.pad(mass.cumsum(1), (1, 0))
    moments = torch.nn.functional.pad((mass * values).cumsum(1), (1, 0))
    edges = _edges(values, centres)
    for _ in range(ITERATIONS):
        share = masses.gather(1, edges).diff(dim=1)
        means = moments.gather(1, edges).diff(dim=1) / share
        centres = torch.where(share > 0, means, centres).cummax(dim=1).values
        previous, edges = edges, _edges(values, centres)
        if torch.equal(edges, previous):
            break
    return centres


def _exact_when_few(values: Tensor, centres: Tensor) -> Tensor:
    rank = torch.nn.functional.pad((values.diff(dim=1) > 0).cumsum(1), (1, 0))
    few = rank[:, -1] < centres.shape[1]
    if not bool(few.any()):
        return centres
    exact = values[few, -1:].expand(-1, centres.shape[1]).clone()
    exact.scatter_(1, rank[few], values[few])
    centres = centres.clone()
    centres[few] = exact
    return centres
