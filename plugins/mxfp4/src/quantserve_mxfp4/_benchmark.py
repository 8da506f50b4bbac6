"""An MXFP4 linear, for `quantserve calibrate`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantserve_kernels import from_fp4, linear
from quantserve_mxfp4.format import GROUP


def make(n: int, k: int, bits: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """A linear [n, k] with random values, and the bytes one call reads."""
    octets = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    packed = from_fp4(octets, torch.full((n, k // GROUP), 2.0**-9, dtype=torch.bfloat16))
    return lambda x: linear(x, packed), packed.nbytes
