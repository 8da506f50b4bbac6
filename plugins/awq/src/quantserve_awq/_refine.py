"""Codes that make up for each other's errors, on the levels that clipping chose."""

from __future__ import annotations

import torch
from torch import Tensor

from quantserve_awq._format import LARGEST, Rounded
from quantserve_quantize.hessian import inverse_factor, spread

DAMP = 0.01
"""Added to the Hessian's diagonal, as a part of its mean."""


def refined(weight: Tensor, made: Rounded, hessian: Tensor) -> Rounded:
    """Round again, input after input, the largest first, each error spread over those that follow.

    Args:
        weight: float32 [n, k].
        made: the weight rounded to nearest; its scales and zero points stay.
        hessian: float32 [k, k].
    """
    scales, zeros = (one.squeeze(-1).t().contiguous() for one in (made.scales, made.zeros))
    group_of = torch.arange(len(hessian)) // made.codes.shape[-1]
    order = hessian.diagonal().argsort(descending=True, stable=True)
    codes = torch.empty_like(weight.t())

    def nearest(at: int, rest: Tensor) -> Tensor:
        i = int(order[at])
        scale, zero = scales[group_of[i]], zeros[group_of[i]]
        codes[i] = (rest[0] / scale + zero).round().clamp(0, LARGEST)
        return (codes[i] - zero) * scale

    spread(weight, inverse_factor(hessian[order][:, order], DAMP), order, nearest)
    return made._replace(codes=codes.t().reshape(made.codes.shape))
