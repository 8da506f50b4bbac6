"""From blocks as GGUF stores them to codes, scales and zero points: W[n, k] = (table[code] - zero) * scale.

Blocks are uint8 [n, blocks of a row, bytes of a block]. Source of the layouts: ggml-common.h and ggml-quants.c of
https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantserve_gguf.blocks import BY_NAME, MIXED
from quantserve_kernels import PackedWeight, pack

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""The 16 values of IQ4_NL and IQ4_XS."""

Affine = tuple[Tensor, Tensor | None]
"""Scales, and what is added to scale x value: [n, blocks, groups of a block] each, float32."""


@dataclass(frozen=True)
class Decoder:
    """How blocks of a type are read.

    Attributes:
        codes: blocks -> uint8 [n, blocks, elements].
        affine: blocks -> scales and offsets.
        values: what the codes stand for, from 0 on.
    """

    codes: Callable[[Tensor], Tensor]
    affine: Callable[[Tensor], Affine]
    values: tuple[int, ...]


def packed(name: str, blocks: Tensor) -> PackedWeight:
    """Pack a weight of a type for the kernels; its blocks are unpacked a few hundred rows at a time.

    Raises:
        ValueError: a scale is not finite.
    """
    kind, decoder = BY_NAME[name], DECODERS[name]
    n, k = blocks.shape[0], blocks.shape[1] * kind.elements
    scales, zeros, constant = _scales(blocks, decoder)

    def codes(first: int, last: int) -> Tensor:
        return _codes(blocks[first:last], decoder, None if constant is None else constant[first:last], kind.group)

    values = torch.tensor(decoder.values + (0,) * (2**kind.bits - len(decoder.values)), dtype=torch.float32)
    return pack(
        codes,
        values.to(blocks.device)[None],
        bits=kind.bits,
        shape=(n, k),
        scales=scales.half() if kind.scale == 16 else scales,
        zeros=zeros,
        group_size=kind.group,
    )


def mixed(name: str, blocks: Tensor) -> dict[str, Tensor]:
    """The same weight in the form of `MIXED`: codes uint8 [n, k], scales and zeros float32 [n, k/16]."""
    kind, decoder = BY_NAME[name], DECODERS[name]
    scales, zeros, constant = _scales(blocks, decoder)
    codes = _codes(blocks, decoder, constant, kind.group)
    lowest = min(decoder.values)
    whole = torch.tensor([value - lowest for value in decoder.values], dtype=torch.uint8, device=blocks.device)
    zeros = torch.full_like(scales, -lowest) if zeros is None else zeros - lowest
    repeat = kind.group // MIXED.group
    return {
        "codes": whole[codes.int()],
        "scales": scales.repeat_interleave(repeat, 1),
        "zeros": zeros.repeat_interleave(repeat, 1),
    }


def pack_mixed(codes: Tensor, scales: Tensor, zeros: Tensor) -> PackedWeight:
    """Pack what `mixed` gave."""
    table = torch.arange(256, dtype=torch.float32, device=codes.device)[None]
    return pack(codes, table, bits=8, scales=scales, zeros=zeros, group_size=MIXED.group)


def dequantized(name: str, blocks: Tensor) -> Tensor:
    """The weight itself, float32 [n, k]: scale x value + offset."""
    decoder = DECODERS[name]
    scales, offsets = decoder.affine(blocks)
    values = torch.tensor(decoder.values, dtype=torch.float32)[decoder.codes(blocks).int()]
    grouped = values.unflatten(2, (scales.shape[2], -1)) * scales[..., None]
    if offsets is not None:
        grouped = grouped + offsets[..., None]
    return grouped.flatten(1)


def _scales(blocks: Tensor, decoder: Decoder) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scales, zero points and where a group is constant, [n, groups].

    An offset with a scale of 0 makes a constant group, which has no zero point in units of its scale: it becomes code
    0 with zero point -1 and the offset as its scale.
    """
    scales, offsets = decoder.affine(blocks)
    scales = scales.flatten(1)
    if offsets is None:
        return scales, None, None
    offsets = offsets.flatten(1)
    constant = (scales == 0) & (offsets != 0)
    scales = torch.where(constant, offsets, scales)
    zeros = torch.where(constant, -1.0, -offsets / torch.where(scales == 0, 1.0, scales))
    return scales, zeros, constant if bool(constant.any()) else None


def _codes(blocks: Tensor, decoder: Decoder, constant: Tensor | None, group: int) -> Tensor:
    codes = decoder.codes(blocks).flatten(1)
    if constant is None:
        return codes
    return codes.masked_fill(constant.repeat_interleave(group, 1), 0)


# --- the layouts -----------------------------------------------------------------------------------


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block, as float32 [n, blocks, 1]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(octets: Tensor, run: int) -> Tensor:
    """4-bit codes of bytes: of every `run` bytes first all lower halves, then all upper halves."""
    runs = octets.unflatten(-1, (-1, run))
    return torch.stack((runs & 15, runs >> 4), dim=-2).flatten(-3)


def _pieces(octets: Tensor, run: int, bits: int) -> Tensor:
    """Codes of `bits` bits of bytes: of every `run` bytes first all lowest, then all next ones."""
    runs = octets.unflatten(-1, (-1, run))
    parts = [(runs >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-2).flatten(-3)


def _fifth(blocks: Tensor, at: int) -> Tensor:
    """The fifth bits of Q5_0 and Q5_1, 32 in four bytes, as 0 or 16."""
    octets = blocks[..., at : at + 4, None]
    return ((octets >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(-2) << 4


def _q5(blocks: Tensor, at: int) -> Tensor:
    return _nibbles(blocks[..., at + 4 : at + 20], 16) | _fifth(blocks, at)


def _scales_and_minima(blocks: Tensor) -> Affine:
    """Of Q4_K and Q5_K: eight 6-bit scales and minima in 12 bytes, times d and dmin."""
    low, high, both = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat((low & 63, (both & 15) | (low >> 6 << 4)), dim=-1)
    minima = torch.cat((high & 63, (both >> 4) | (high >> 6 << 4)), dim=-1)
    return _half(blocks, 0) * scales.float(), -(_half(blocks, 2) * minima.float())


def _q5_k(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[..., 48:176], 32) | (_pieces(blocks[..., 16:48], 32, 1) << 4)


def _q2_k(blocks: Tensor) -> Affine:
    scales = blocks[..., :16]
    return _half(blocks, 80) * (scales & 15).float(), -(_half(blocks, 82) * (scales >> 4).float())


def _q3_k(blocks: Tensor) -> Tensor:
    """Two bits and an inverted third: code 0..7 stands for -4..3."""
    return _pieces(blocks[..., 32:96], 32, 2) | (_pieces(blocks[..., :32], 32, 1) << 2)


def _q3_k_scales(blocks: Tensor) -> Affine:
    packed = blocks[..., 96:108]
    low = torch.cat((packed[..., :8] & 15, packed[..., :8] >> 4), dim=-1)
    high = torch.cat([(packed[..., 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1)
    return _half(blocks, 108) * ((low | (high << 4)).float() - 32), None


def _q6_k(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[..., :128], 64) | (_pieces(blocks[..., 128:192], 32, 2) << 4)


def _q6_k_scales(blocks: Tensor) -> Affine:
    return _half(blocks, 208) * blocks[..., 192:208].contiguous().view(torch.int8).float(), None


def _iq4_xs_scales(blocks: Tensor) -> Affine:
    octets = blocks[..., 4:8]
    low = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)
    high = torch.stack([(blocks[..., 2:4] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)
    return _half(blocks, 0) * ((low | (high << 4)).float() - 32), None


def _simple(scale: int = 0, minimum: int | None = None) -> Callable[[Tensor], Affine]:
    return lambda blocks: (_half(blocks, scale), None if minimum is None else _half(blocks, minimum))


DECODERS = {
    "Q4_0": Decoder(lambda b: _nibbles(b[..., 2:], 16), _simple(), tuple(range(-8, 8))),
    "Q4_1": Decoder(lambda b: _nibbles(b[..., 4:], 16), _simple(0, 2), tuple(range(16))),
    "Q5_0": Decoder(lambda b: _q5(b, 2), _simple(), tuple(range(-16, 16))),
    "Q5_1": Decoder(lambda b: _q5(b, 4), _simple(0, 2), tuple(range(32))),
    "Q8_0": Decoder(lambda b: b[..., 2:] ^ 128, _simple(), tuple(range(-128, 128))),
    "Q2_K": Decoder(lambda b: _pieces(b[..., 16:80], 32, 2), _q2_k, tuple(range(4))),
    "Q3_K": Decoder(_q3_k, _q3_k_scales, tuple(range(-4, 4))),
    "Q4_K": Decoder(lambda b: _nibbles(b[..., 16:144], 32), _scales_and_minima, tuple(range(16))),
    "Q5_K": Decoder(_q5_k, _scales_and_minima, tuple(range(32))),
    "Q6_K": Decoder(_q6_k, _q6_k_scales, tuple(range(-32, 32))),
    "IQ4_NL": Decoder(lambda b: _nibbles(b[..., 2:], 16), _simple(), IQ4),
    "IQ4_XS": Decoder(lambda b: _nibbles(b[..., 8:], 16), _iq4_xs_scales, IQ4),
}
"""By the names of the types."""
