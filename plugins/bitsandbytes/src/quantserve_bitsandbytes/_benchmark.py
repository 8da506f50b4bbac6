"""A bitsandbytes linear on quantserve's kernel, for `quantserve calibrate`."""

from collections.abc import Callable

import torch
from torch import Tensor

from quantserve_bitsandbytes.format import BLOCK
from quantserve_kernels import from_nf4, linear, pack


def make(n: int, k: int, bits: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """An NF4 or int8 linear [n, k] with random codes, and the bytes one call reads."""
    if bits == 4:
        packed = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8)
        weight = from_nf4(packed, torch.full((n * k // BLOCK,), 0.05), (n, k))
    else:
        values = torch.arange(-128.0, 128.0)[None]
        codes = torch.randint(0, 256, (n, k), dtype=torch.uint8)
        weight = pack(codes, values, bits=8, scales=torch.full((n, 1), 2.0**-8))
    return lambda x: linear(x, weight), weight.nbytes
