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

    Deterministic: two starts (quantiles, even spacing), the better result per row. A row with at most `clusters`
    different values gets exactly these values. A row whose weights are all zero counts as unweighted.
    """
    values, order = rows.to(torch.float64).sort(dim=1, stable=True)
    mass = torch.ones_like(values) if weights is None else weights.to(torch.float64).gather(1, order)
    mass = torch.where(mass.sum(1, keepdim=True) > 0, mass, 1.0)
    sums = _Prefix(mass), _Prefix(mass * values), _Prefix(mass * values * values)
    total = sums[0].cumulative[:, -1:]
    quantiles = (torch.arange(clusters, dtype=torch.float64) + 0.5) / clusters
    at = torch.searchsorted(sums[0].cumulative[:, 1:].contiguous(), (total * quantiles).contiguous())
    by_quantile = values.gather(1, at.clamp_(max=values.shape[1] - 1))
    inside = mass > 0
    low = torch.where(inside, values, torch.inf).amin(1, keepdim=True)
    high = torch.where(inside, values, -torch.inf).amax(1, keepdim=True)
    best, cost = _lloyd(values, sums, by_quantile)
    other, other_cost = _lloyd(values, sums, low + (high - low) * quantiles)
    best = torch.where((other_cost < cost)[:, None], other, best)
    return _exact_when_few(values, best).to(torch.float32)


def encode(rows: Tensor, table: Tensor) -> Tensor:
    """Index uint8 [n, k] of the nearest entry of each row's ascending codebook [n, clusters]."""
    borders = (table[:, 1:].to(torch.float64) + table[:, :-1].to(torch.float64)) / 2
    return torch.searchsorted(borders.contiguous(), rows.to(torch.float64).contiguous()).to(torch.uint8)


class _Prefix:
    def __init__(self, terms: Tensor) -> None:
        self.cumulative = torch.nn.functional.pad(terms.cumsum(1), (1, 0))

    def between(self, edges: Tensor) -> Tensor:
        """Sums over the ranges edges[i]..edges[i+1] of each row."""
        return self.cumulative.gather(1, edges).diff(dim=1)


def _edges(values: Tensor, centres: Tensor) -> Tensor:
    borders = (centres[:, 1:] + centres[:, :-1]) / 2
    inner = torch.searchsorted(values, borders.contiguous())
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=values.shape[1])


def _lloyd(values: Tensor, sums: tuple[_Prefix, _Prefix, _Prefix], centres: Tensor) -> tuple[Tensor, Tensor]:
    mass, first, second = sums
    edges = _edges(values, centres)
    for _ in range(ITERATIONS):
        counts = mass.between(edges)
        centres = torch.where(counts > 0, first.between(edges) / counts, centres).cummax(dim=1).values
        previous, edges = edges, _edges(values, centres)
        if torch.equal(edges, previous):
            break
    cost = (second.between(edges) - 2 * centres * first.between(edges) + centres**2 * mass.between(edges)).sum(1)
    return centres, cost


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
