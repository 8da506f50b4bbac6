"""An AWQ linear on quantserve's kernels, for `quantserve calibrate`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantserve_kernels import from_awq, linear

GROUP = 128
_STRIP = 512  # output channels with values of their own; the time does not depend on values


def make(n: int, k: int, bits: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """A linear [n, k] with random codes in groups of 128, and the bytes one call reads."""

    def words(rows: int) -> Tensor:
        strip = torch.randint(-(2**31), 2**31, (rows, min(n, _STRIP) // 8), dtype=torch.int32)
        return strip.repeat(1, -(-n // _STRIP))[:, : n // 8].contiguous()

    scales = (0.004 * (0.5 + torch.rand(k // GROUP, n))).half()
    weight = from_awq(words(k), words(k // GROUP), scales)
    return lambda x: linear(x, weight), weight.nbytes
