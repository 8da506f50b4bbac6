"""A SqueezeLLM linear without a sparse part, for `quantserve calibrate`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantserve_kernels import linear, pack

_STRIP = 512  # output channels with codes of their own; the time does not depend on codes


def make(n: int, k: int, bits: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """A linear [n, k] with random codes and a codebook per channel, and the bytes one call reads."""
    codes = torch.randint(0, 2**bits, (_STRIP, k), dtype=torch.uint8)
    table = 0.02 * torch.randn(n, 2**bits).sort(dim=1).values
    weight = pack(lambda first, last: codes[: last - first], table, bits=bits, shape=(n, k))
    return lambda x: linear(x, weight), weight.nbytes
