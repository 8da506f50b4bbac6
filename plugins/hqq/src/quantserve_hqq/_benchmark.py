"""An HQQ linear on quantserve's kernel, for `quantserve calibrate`."""

from collections.abc import Callable

import torch
from torch import Tensor

from quantserve_kernels import linear, pack

GROUP = 64


def make(n: int, k: int, bits: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """A linear [n, k] with random codes in groups of 64, and the bytes one call reads."""
    scales = torch.full((n, k // GROUP), 2.0**-bits, dtype=torch.float16)
    weight = pack(
        torch.randint(0, 2**bits, (n, k), dtype=torch.uint8),
        torch.arange(2**bits, dtype=torch.float32)[None],
        bits=bits,
        scales=scales,
        zeros=torch.full_like(scales, 2.0 ** (bits - 1) - 0.25),
        group_size=GROUP,
    )
    return lambda x: linear(x, weight), weight.nbytes
