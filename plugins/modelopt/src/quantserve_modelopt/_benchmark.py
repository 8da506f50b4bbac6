"""A linear in NVFP4 or FP8, for `quantserve calibrate`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantserve_kernels import from_fp4, from_fp8, linear
from quantserve_modelopt.format import GROUP


def make(n: int, k: int, bits: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """A linear [n, k] with random values and scales by group (4 bits) or one (8 bits), and the bytes one call reads."""
    if bits == 4:
        packed = from_fp4(
            torch.randint(0, 256, (n, k // 2), dtype=torch.uint8), 1e-3 * (0.5 + torch.rand(n, k // GROUP))
        )
    else:
        weight = torch.randint(0, 127, (n, k), dtype=torch.uint8).view(torch.float8_e4m3fn)
        packed = from_fp8(weight, torch.tensor(1e-3))
    return lambda x: linear(x, packed), packed.nbytes
