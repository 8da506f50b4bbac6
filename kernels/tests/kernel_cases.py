"""Weights of every format with their dense float64 matrix, built here without the package's own decoders."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import quantserve_kernels as kernels
from quantserve_kernels._formats import NF4


@dataclass(frozen=True)
class Case:
    """A packed weight and the matrix [n, k] it means."""

    name: str
    weight: kernels.PackedWeight
    matrix: Tensor


def codebook(n: int, k: int, bits: int, *, sparse: float = 0.0, seed: int = 0) -> Case:
    """A codebook per output channel; `sparse` is the share of entries that are added."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=g)
    table = torch.randn(n, 2**bits, generator=g)
    matrix = torch.gather(table.double(), 1, codes.long())
    csr = None
    if sparse:
        extra = torch.randn(n, k, generator=g) * (torch.rand(n, k, generator=g) < sparse)
        matrix += extra.double()
        csr = csr_of(extra)
    return Case(f"codebook{bits}", kernels.pack(codes, table, bits=bits, sparse=csr), matrix)


def affine(n: int, k: int, bits: int, group: int, *, zeros: bool = True, sparse: float = 0.0, seed: int = 1) -> Case:
    """Integers with a scale and a zero point per group, as AWQ and GPTQ mean them."""
    g = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else k // group
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=g)
    scales = (torch.rand(n, groups, generator=g) * 0.01 + 0.005).half()
    zero = torch.randint(0, 2**bits, (n, groups), generator=g).half() if zeros else None
    table = torch.arange(2**bits, dtype=torch.float32)[None]
    grouped = codes.double().view(n, groups, -1)
    if zero is not None:
        grouped = grouped - zero.double()[:, :, None]
    matrix = (grouped * scales.double()[:, :, None]).reshape(n, k)
    csr = None
    if sparse:
        extra = torch.randn(n, k, generator=g) * (torch.rand(n, k, generator=g) < sparse)
        matrix += extra.double()
        csr = csr_of(extra)
    weight = kernels.pack(codes, table, bits=bits, scales=scales, zeros=zero, group_size=group, sparse=csr)
    return Case(f"affine{bits}-g{group}", weight, matrix)


def grouped_codebook(n: int, k: int, bits: int, group: int, seed: int = 3) -> Case:
    """A codebook per output channel, and a scale and a zero point per group."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=g)
    table = torch.randn(n, 2**bits, generator=g)
    scales, zeros = (torch.rand(n, k // group, generator=g).half() + 0.5 for _ in range(2))
    entries = torch.gather(table.double(), 1, codes.long()).view(n, -1, group)
    matrix = ((entries - zeros.double()[:, :, None]) * scales.double()[:, :, None]).reshape(n, k)
    weight = kernels.pack(codes, table, bits=bits, scales=scales, zeros=zeros, group_size=group)
    return Case(f"codebook{bits}-g{group}", weight, matrix)


def fp8(n: int, k: int, dtype: torch.dtype, group: int, seed: int = 4) -> Case:
    """Eight-bit floats that are finite, decoded by a table of all 256, with a float32 scale per group."""
    g = torch.Generator().manual_seed(seed)
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = values.isfinite().nonzero().flatten().to(torch.uint8)
    codes = finite[torch.randint(0, finite.numel(), (n, k), generator=g)]
    scales = torch.rand(n, k // group, generator=g) * 0.01 + 0.005
    matrix = (codes.view(dtype).double().view(n, -1, group) * scales.double()[:, :, None]).reshape(n, k)
    table = values.nan_to_num(0.0, 0.0, 0.0)[None]
    name = str(dtype).removeprefix("torch.")
    weight = kernels.pack(codes, table, bits=8, scales=scales, group_size=group)
    return Case(f"{name}-g{group}", weight, matrix)


def nf4(n: int, k: int, block: int, seed: int = 2) -> Case:
    """A global codebook that bfloat16 does not hold exactly, with a float32 scale per block."""
    g = torch.Generator().manual_seed(seed)
    table = torch.tensor(NF4)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=g)
    absmax = torch.rand(n, k // block, generator=g) + 0.5
    matrix = (table.double()[codes.long()].view(n, -1, block) * absmax.double()[:, :, None]).reshape(n, k)
    octets = codes[:, ::2] << 4 | codes[:, 1::2]
    return Case(f"nf4-b{block}", kernels.from_nf4(octets, absmax.flatten(), (n, k)), matrix)


def csr_of(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows, cols, vals of the nonzeros."""
    channel, feature = matrix.nonzero(as_tuple=True)
    rows = torch.zeros(matrix.shape[0] + 1, dtype=torch.int64)
    rows[1:] = torch.bincount(channel, minlength=matrix.shape[0]).cumsum(0)
    return rows.int(), feature.int(), matrix[channel, feature].float()


def relative_error(y: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((y.double() - reference).norm() / reference.norm().clamp(min=1e-30))
