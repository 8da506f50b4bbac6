"""What a calibration text tells of the Hessian of a linear."""

from __future__ import annotations

import torch
from torch import Tensor

STEADY = 2
"""How much fewer tokens than inputs pull a Hessian towards its diagonal."""


def steadied(hessian: Tensor, tokens: int | None) -> Tensor:
    """H as far as so many tokens tell it: what is not on the diagonal times tokens / (tokens + STEADY * k).

    Few tokens correlate inputs by chance, and another text correlates others; codes would fit both.

    Args:
        hessian: the mean of x x^T, float32 [k, k].
        tokens: of the mean; None leaves it as it is.
    """
    share = 1 / (1 + STEADY * len(hessian) / tokens) if tokens else 1.0
    return share * hessian + torch.diag((1 - share) * hessian.diagonal())
