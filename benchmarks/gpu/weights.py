"""A random linear of every contender: bfloat16 for cuBLAS, packed for ours. Nothing crosses from the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Generator, Tensor

from benchmarks.gpu.formats import CUBLAS, FOUR, NF4, SPARSE, THREE
from benchmarks.kernels.formats import NF4_BLOCK
from benchmarks.kernels.formats import SPARSE as SPARSE_SHARE
from benchmarks.kernels.shapes import Shape
from quantserve_kernels import PackedWeight, from_nf4, linear, pack
from quantserve_kernels._formats import NF4 as NF4_VALUES

STD = 0.02  # of the weights

Weight: TypeAlias = Tensor | PackedWeight
Dense = Callable[[], Tensor]
"""Gives W float32 [n, k] before any rounding, made from what was packed and not by unpacking it."""


def multiply(x: Tensor, weight: Weight) -> Tensor:
    """x [m, k] times W^T, [m, n]: by cuBLAS for a plain weight, by our kernels for a packed one."""
    return linear(x, weight) if isinstance(weight, PackedWeight) else torch.nn.functional.linear(x, weight)


def clone(weight: Weight) -> Weight:
    """The same in memory of its own."""
    if not isinstance(weight, PackedWeight):
        return weight.clone()
    return dataclasses.replace(weight, **{name: tensor.clone() for name, tensor in weight.tensors().items()})


def normal(*shape: int, device: str, seed: int = 1) -> Tensor:
    """bfloat16 from a normal distribution; the same every time."""
    return torch.randn(*shape, generator=generator(device, seed), device=device, dtype=torch.bfloat16)


def generator(device: str, seed: int) -> Generator:
    """Random numbers, the same ones every time."""
    return torch.Generator(device).manual_seed(seed)


def make(name: str, shape: Shape, device: str) -> tuple[Weight, Dense]:
    """The weight of a contender, and W for the check."""
    return MAKERS[name](shape.n, shape.k, device)


def plain(n: int, k: int, device: str) -> tuple[Weight, Dense]:
    """What cuBLAS multiplies."""
    weight = normal(n, k, device=device).mul_(STD)
    return weight, weight.float


def squeezellm(n: int, k: int, device: str, bits: int, share: float = 0.0) -> tuple[Weight, Dense]:
    """A codebook per channel, and perhaps a share of sparse values that are added."""
    random = generator(device, 2)
    codes = torch.randint(0, 2**bits, (n, k), generator=random, device=device, dtype=torch.uint8)
    table = STD * torch.randn(n, 2**bits, generator=random, device=device)
    if not share:
        return pack(codes, table, bits=bits), lambda: torch.gather(table, 1, codes.long())
    channels, features = (torch.rand(n, k, generator=random, device=device) < share).nonzero(as_tuple=True)
    values = 5 * STD * torch.randn(len(channels), generator=random, device=device)
    rows = torch.zeros(n + 1, dtype=torch.int32, device=device)
    rows[1:] = torch.bincount(channels, minlength=n).cumsum(0)

    def dense() -> Tensor:
        return torch.gather(table, 1, codes.long()).index_put_((channels, features), values, accumulate=True)

    return pack(codes, table, bits=bits, sparse=(rows, features.int(), values)), dense


def nf4(n: int, k: int, device: str) -> tuple[Weight, Dense]:
    """bitsandbytes' NF4."""
    random = generator(device, 3)
    packed = torch.randint(0, 256, (n, k // 2), generator=random, device=device, dtype=torch.uint8)
    absmax = STD * (0.5 + torch.rand(n, k // NF4_BLOCK, generator=random, device=device))

    def dense() -> Tensor:
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).long()
        values = torch.tensor(NF4_VALUES, device=device)[codes].view(n, -1, NF4_BLOCK)
        return (values * absmax[:, :, None]).view(n, k)

    return from_nf4(packed, absmax.flatten(), (n, k)), dense


MAKERS: dict[str, Callable[[int, int, str], tuple[Weight, Dense]]] = {
    CUBLAS: plain,
    FOUR: partial(squeezellm, bits=4),
    THREE: partial(squeezellm, bits=3),
    SPARSE: partial(squeezellm, bits=4, share=SPARSE_SHARE),
    NF4: nf4,
}
