"""The operators in plain torch: what runs where nothing was compiled, and a second opinion for the tests.

The layout of the packed codes is described in csrc/kernel.h.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from quantserve_kernels._arguments import Packed, of_experts, of_linear

TILE = 4
COLUMNS = 16  # channels of a tile where all share a table
VECTOR = 32
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swigluoai")
VECTORS = {2: 8, 3: 16, 4: 4, 8: 2}  # bits -> vectors in a block
CHANNELS = 512  # decoded at once


class Shape(NamedTuple):
    """The numbers of a packed weight that follow from bits, n, k and the group size."""

    group: int
    group_padded: int
    groups: int
    k_padded: int


def columns_of(table: Tensor) -> bool:
    """Whether codes are laid out in columns: where all channels share one table."""
    return table.shape[0] == 1


def tile_of(table: Tensor) -> int:
    """Output channels of a tile."""
    return COLUMNS if columns_of(table) else TILE


def shape_of(bits: int, k: int, group_size: int, columns: bool) -> Shape:
    """Group sizes become multiples of 32, of a block in columns, and the whole a multiple of a block.

    Raises:
        ValueError: unknown bits, or a group size that does not divide k.
    """
    if bits not in VECTORS:
        raise ValueError(f"bits is {bits}; known: 2, 3, 4, 8")
    group = k if group_size == -1 else group_size
    if group < 1 or k % group:
        raise ValueError(f"group_size {group_size} does not divide k {k}")
    block = VECTORS[bits] * (2 if columns else VECTOR)
    step = block if columns else VECTOR
    padded = -(-group // step) * step
    return Shape(group, padded, k // group, -(-(k // group * padded) // block) * block)


def pack_codes(codes: Tensor, bits: int, group_size: int, columns: bool = False) -> Tensor:
    """Codes uint8 [n, k] to the kernel's layout, uint8 [bytes].

    Raises:
        ValueError: wrong shape or dtype, or a code that does not fit.
    """
    if codes.ndim != 2 or codes.dtype != torch.uint8:
        raise ValueError(f"codes is {codes.dtype} {list(codes.shape)}, expected uint8 [n, k]")
    n, k = codes.shape
    shape = shape_of(bits, k, group_size, columns)
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes go up to {int(codes.max())}, which does not fit {bits} bits (0..{2**bits - 1})")
    tile = COLUMNS if columns else TILE
    rows = -(-n // tile) * tile
    spread = codes.new_zeros(rows, shape.k_padded)
    groups = spread[:n, : shape.groups * shape.group_padded].unflatten(1, (shape.groups, shape.group_padded))
    groups[:, :, : shape.group] = codes.view(n, shape.groups, shape.group)
    # [tiles, tile, blocks, vectors, words of a channel in a load]
    vectors = spread.view(rows // tile, tile, -1, VECTORS[bits], 2 if columns else VECTOR).to(torch.int32).unbind(3)
    if bits == 3:
        last = vectors[15]
        words = [sum(vectors[5 * i + j] << 3 * j for j in range(5)) | (last >> i & 1) << 15 for i in range(3)]
    else:
        words = [sum(vector << bits * j for j, vector in enumerate(vectors))]
    # [tiles, tile, blocks, words] -> [tiles, blocks, loads, tile, words], or [tiles, blocks, tile, loads, words]
    stacked = torch.stack(words, dim=3).permute((0, 2, 3, 1, 4) if columns else (0, 2, 1, 3, 4)).to(torch.int16)
    return stacked.contiguous().view(torch.uint8).flatten()


def unpack_codes(packed: Tensor, bits: int, n: int, k: int, group_size: int, columns: bool = False) -> Tensor:
    """Undo `pack_codes`: uint8 [n, k]."""
    shape = shape_of(bits, k, group_size, columns)
    loads = 3 if bits == 3 else 1
    blocks = shape.k_padded // (VECTORS[bits] * (2 if columns else VECTOR))
    words = packed.view(torch.int16)
    if columns:
        words = words.view(-1, blocks, loads, COLUMNS, 2).permute(0, 3, 1, 2, 4)
    else:
        words = words.view(-1, blocks, TILE, loads, VECTOR).transpose(1, 2)
    word = (words.to(torch.int32) & 0xFFFF).unbind(3)
    if bits == 3:
        vectors = [word[j // 5] >> 3 * (j % 5) & 7 for j in range(15)]
        vectors.append(word[0] >> 15 | (word[1] >> 15) << 1 | (word[2] >> 15) << 2)
    else:
        vectors = [word[0] >> bits * j & (2**bits - 1) for j in range(VECTORS[bits])]
    spread = torch.stack(vectors, dim=3).to(torch.uint8).reshape(-1, shape.k_padded)[:n]
    groups = spread[:, : shape.groups * shape.group_padded].unflatten(1, (shape.groups, shape.group_padded))
    return groups[:, :, : shape.group].reshape(n, k)


def interleave(values: Tensor, tile: int) -> Tensor:
    """Scales or zeros [n, groups] as the CPU kernels read them: [n/tile, groups, tile], the last channel repeated."""
    n, groups = values.shape
    padded = torch.cat([values, values[-1:].expand(-n % tile, groups)]) if n % tile else values
    return padded.view(-1, tile, groups).transpose(1, 2).contiguous()


def plain(values: Tensor, n: int) -> Tensor:
    """Undo `interleave`: [n, groups]."""
    return values.transpose(1, 2).reshape(-1, values.shape[1])[:n]


def decode(
    codes: Tensor, table: Tensor, scales: Tensor | None, zeros: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """The dense part of W [n, k] from codes uint8 [n, k] and the side data of the same n channels."""
    n, k = codes.shape
    entries = table.to(dtype).expand(n, -1)
    weight = torch.gather(entries, 1, codes.to(torch.int64))
    if scales is None:
        return weight
    groups = weight.view(n, scales.shape[1], -1)
    if zeros is not None:
        groups = groups - zeros.to(dtype).unsqueeze(2)
    return (groups * scales.to(dtype).unsqueeze(2)).view(n, k)


def channels_of(rows: Tensor) -> Tensor:
    """The output channel of each entry of a CSR matrix."""
    return torch.repeat_interleave(torch.arange(rows.numel() - 1, device=rows.device), rows.diff().to(torch.int64))


def features_of(cols: Tensor, shape: Shape) -> Tensor:
    """The input feature of each entry of a sparse part, whose columns count the padding of groups."""
    stored = cols.to(torch.int64)
    return stored // shape.group_padded * shape.group + stored % shape.group_padded


def codebook_linear(*arguments: Any) -> Tensor:
    """`x` [..., k] times the decoded weight, in float32, some channels at a time; returns [..., n] in x's dtype."""
    x, (codes, table, scales, zeros, rows, cols, vals, bits, n, k, group_size), bias = of_linear(arguments)
    if x.shape[-1] != k:
        raise ValueError(f"x has shape {list(x.shape)}, expected [..., {k}] (k)")
    shape, columns, tile = shape_of(bits, k, group_size, columns_of(table)), columns_of(table), tile_of(table)
    size = shape.k_padded * bits // 8 * tile
    flat = x.reshape(-1, k).to(torch.float32)
    out = flat.new_empty(flat.shape[0], n)
    for first in range(0, n, CHANNELS):
        last = min(first + CHANNELS, n)
        part = slice(first, last)
        tiles = codes[first // tile * size : -(-last // tile) * size]
        weight = decode(
            unpack_codes(tiles, bits, last - first, k, group_size, columns),
            table if columns else table[part],
            None if scales is None else plain(scales, n)[part],
            None if zeros is None else plain(zeros, n)[part],
            group_size,
            torch.float32,
        )
        out[:, part] = flat @ weight.t()
    if rows is not None and cols is not None and vals is not None:
        out.index_add_(1, channels_of(rows), flat[:, features_of(cols, shape)] * vals)
    if bias is not None:
        out += bias
    return out.to(x.dtype).view(*x.shape[:-1], n)


def activate(h: Tensor, activation: str) -> Tensor:
    """One of `ACTIVATIONS`, [..., 2 * i] to [..., i]; `quantserve_kernels.experts` defines them."""
    if activation == "swigluoai":
        gate, up = h[..., ::2].clamp(max=7), h[..., 1::2].clamp(-7, 7) + 1
        return gate * torch.sigmoid(1.702 * gate) * up
    gate, up = h.chunk(2, -1)
    if activation == "silu":
        return silu(gate) * up
    return gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def codebook_experts(*arguments: Any) -> Tensor:
    """The experts of all tokens in float32, one expert at a time; see `quantserve_kernels.experts`."""
    x, topk_ids, topk_weights, activation, w13, w13_bias, w2, w2_bias = of_experts(arguments)
    count = w2.n // w13.k
    flat = x.to(torch.float32)
    out = torch.zeros_like(flat)
    for expert in range(count):
        token, choice = (topk_ids == expert).nonzero(as_tuple=True)
        if token.numel():
            h = codebook_linear(*_one(flat[token], w13, w13_bias, expert, count))
            y = codebook_linear(*_one(activate(h, activation), w2, w2_bias, expert, count))
            out.index_add_(0, token, y * topk_weights[token, choice, None])
    return out.to(x.dtype)


def _one(x: Tensor, stack: Packed, biases: Tensor | None, expert: int, count: int) -> tuple[Any, ...]:
    """The arguments of `codebook_linear` for one expert of a weight [experts * n, k] with biases [experts, n]."""

    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.unflatten(0, (count, -1))[expert]

    n = stack.n // count
    rows, cols, vals = stack.rows, stack.cols, stack.vals
    if rows is not None and cols is not None and vals is not None:
        rows = rows[expert * n : (expert + 1) * n + 1]
        entries = slice(int(rows[0]), int(rows[-1]))
        rows, cols, vals = rows - rows[0], cols[entries], vals[entries]
    table = stack.table if columns_of(stack.table) else part(stack.table)
    bias = None if biases is None else biases[expert]
    tensors = (part(stack.codes), table, part(stack.scales), part(stack.zeros), rows, cols, vals)
    return (x, *tensors, bias, stack.bits, n, stack.k, stack.group_size)
