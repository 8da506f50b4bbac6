"""Weighted 1-D k-means for many channels at once: dynamic programming over candidate borders, coarse to fine.

On a sorted row a cluster is a range, so prefix sums give its cost without touching the weights again. The best borders
among C candidates each are found exactly, in O(clusters * C**2) per channel: first among candidates spread over the
row, then among the neighbours of each border. Lloyd iterations end the search.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

CANDIDATES = 128
"""Borders that the first search chooses from; their differences bound its memory, 24 * CANDIDATES**2 bytes a row."""
STEPS = (8, 8, 2, 2, 1, 1)
"""Distances of the neighbours that each further search chooses from."""
REACH = 4
"""Neighbours on each side."""
ITERATIONS = 50


def codebooks(rows: Tensor, clusters: int, weights: Tensor | None = None) -> Tensor:
    """Codebooks float32 [n, clusters], ascending, minimising sum(weights * (rows - nearest)**2) per row of [n, k].

    Deterministic, and within 0.2 % of the optimum in the tests. A row with at most `clusters` different values gets
    exactly these values. A row whose weights are all zero counts as unweighted.
    """
    values, order = rows.to(torch.float32).sort(dim=1, stable=True)
    values = values.to(torch.float64)
    mass = torch.ones_like(values) if weights is None else weights.gather(1, order).to(torch.float64)
    mass = torch.where(mass.sum(1, keepdim=True) > 0, mass, 1.0)
    mass = mass / mass.sum(1, keepdim=True)
    sums = torch.stack([pad(moment.cumsum(1), (1, 0)) for moment in (mass, mass * values, mass * values**2)])
    borders = _best(sums, _spread(values, mass).expand(clusters - 1, -1, -1))
    neighbours = torch.arange(-REACH, REACH + 1)
    for step in STEPS:
        borders = _best(sums, (borders[:, :, None] + step * neighbours).clamp_(0, values.shape[1]))
    return _exact_when_few(values, _lloyd(values, sums, borders)).to(torch.float32)


def encode(rows: Tensor, table: Tensor) -> Tensor:
    """Index uint8 [n, k] of the nearest entry of each row's ascending codebook [n, clusters]."""
    borders = (table[:, 1:].to(torch.float64) + table[:, :-1].to(torch.float64)) / 2
    return torch.searchsorted(borders.contiguous(), rows.to(torch.float64).contiguous()).to(torch.uint8)


def _spread(values: Tensor, mass: Tensor) -> Tensor:
    """Candidates for all borders, positions [n, CANDIDATES] in the sorted rows, as the cube root of the weights'
    density, which is the optimum for many clusters."""
    # Between neighbours the density is mass / gap, so gap * density**(1/3) is what the interval should get.
    share = (values.diff(dim=1) ** 2 * (mass[:, 1:] + mass[:, :-1]) / 2) ** (1 / 3)
    for _ in range(2):  # a wide gap holds one border, not many
        share = share.minimum(share.sum(1, keepdim=True) / CANDIDATES)
    share = pad(share, (1, 0)).cumsum(1)
    steps = (torch.arange(CANDIDATES, dtype=torch.float64) + 0.5) / CANDIDATES
    return torch.searchsorted(share, (share[:, -1:] * steps).contiguous())


def _best(sums: Tensor, candidates: Tensor) -> Tensor:
    """The borders of least cost, one of each set of candidates.

    Args:
        sums: prefix sums of mass, first and second moment, float64 [3, n, k + 1].
        candidates: positions in the sorted rows, int64 [borders, n, candidates], ascending.

    Returns:
        Positions [borders, n].
    """
    shared = candidates.stride(0) == 0  # all borders have the same candidates, so all pairs the same costs
    here = _at(sums, candidates[0])
    cost = _cost(here, here) if shared else None
    least = _cost(sums[:, :, :1], here)[:, 0]
    came = []
    for positions in candidates[1:]:
        before, here = here, here if shared else _at(sums, positions)
        total = least[:, :, None] + (_cost(before, here) if cost is None else cost)
        least, choice = total.min(1)
        came.append(choice)
    choice = (least + _cost(here, sums[:, :, -1:])[:, :, 0]).argmin(1, keepdim=True)
    chosen = [choice]
    for back in reversed(came):
        chosen.append(choice := back.gather(1, choice))
    return candidates.gather(2, torch.stack(chosen[::-1]))[:, :, 0]


def _at(sums: Tensor, positions: Tensor) -> Tensor:
    return sums.gather(2, positions.expand(3, -1, -1))


def _cost(begin: Tensor, end: Tensor) -> Tensor:
    """The cost of a cluster from each beginning to each end, float32 [n, beginnings, ends]; inf where they cross."""
    mass, first, second = end[:, :, None, :] - begin[:, :, :, None]
    cost = second.sub_(first.square_().div_(mass.clamp(min=1e-300)))
    return cost.masked_fill_(mass < 0, torch.inf).to(torch.float32)


def _lloyd(values: Tensor, sums: Tensor, borders: Tensor) -> Tensor:
    """Move each centre to the mean of the values nearest to it, until none changes its values.

    Args:
        values: sorted rows [n, k].
        sums: see `_best`.
        borders: positions [clusters - 1, n] to begin with.

    Returns:
        Centres [n, clusters], ascending.
    """
    k = values.shape[1]
    inner = borders.T.contiguous()
    centres = values.gather(1, pad(inner, (1, 0)).clamp(max=k - 1))
    for _ in range(ITERATIONS):
        edges = pad(pad(inner, (1, 0)), (0, 1), value=k)
        share = sums[0].gather(1, edges).diff(dim=1)
        means = sums[1].gather(1, edges).diff(dim=1) / share
        centres = torch.where(share > 0, means, centres).cummax(dim=1).values
        previous, inner = inner, torch.searchsorted(values, (centres[:, 1:] + centres[:, :-1]) / 2)
        if torch.equal(inner, previous):
            break
    return centres


def _exact_when_few(values: Tensor, centres: Tensor) -> Tensor:
    rank = pad((values.diff(dim=1) > 0).cumsum(1), (1, 0))
    few = rank[:, -1] < centres.shape[1]
    if not bool(few.any()):
        return centres
    exact = values[few, -1:].expand(-1, centres.shape[1]).clone()
    exact.scatter_(1, rank[few], values[few])
    centres = centres.clone()
    centres[few] = exact
    return centres
