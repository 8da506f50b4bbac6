"""An FP8 linear with a scale for each 128 x 128 block, for `quantserve calibrate`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantserve_kernels import from_fp8, linear

BLOCK = 128


def make(n: int, k: int, bits: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """A linear [n, k] with random values, and the bytes one call reads."""
    weight = torch.randint(0, 127, (n, k), dtype=torch.uint8).view(torch.float8_e4m3fn)
    packed = from_fp8(weight, 1e-3 * (0.5 + torch.rand(-(-n // BLOCK), -(-k // BLOCK))), (BLOCK, BLOCK))
    return lambda x: linear(x, packed), packed.nbytes
