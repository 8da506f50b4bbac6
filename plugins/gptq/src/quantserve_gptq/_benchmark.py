"""A GPTQ linear on quantserve's kernel, for `quantserve calibrate`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantserve_gptq._packing import pack_linear
from quantserve_kernels import linear

GROUP = 128


def make(n: int, k: int, bits: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """A symmetric linear [n, k] with random codes in groups of 128, and the bytes one call reads."""
    words = torch.randint(-(2**31), 2**31, (k * bits // 32, n), dtype=torch.int32)
    scales = (0.004 * (0.5 + torch.rand(k // GROUP, n))).half()
    zeros = torch.zeros(k // GROUP, n * bits // 32, dtype=torch.int32)
    weight, _ = pack_linear(words, zeros, scales, None, bits=bits, sym=True, zero_offset=1)
    return lambda x: linear(x, weight), weight.nbytes
