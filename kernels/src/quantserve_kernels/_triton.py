"""y = x @ W^T on NVIDIA GPUs, W decoded from packed codes inside the kernel.

W[n, k] = (table[n or 0, code[n, k]] - zeros[n, k // group_size]) * scales[n, k // group_size]

GPU layout of the codes. A row is cut into chunks, a chunk is 32 int32 words, and field f of word j (its bits f * bits
and up) is code f * 32 + j of the chunk. So consecutive threads read consecutive words, 16 bytes each; one shift by
a constant gives neighbouring threads neighbouring codes, and x is read coalesced too; and one field of a chunk, for any
number of rows, is a tile for `tl.dot`. Three bits are the layout of their low two bits, then the third bits: one word
for two chunks, the first chunk's in its low half.

A row of `table` is one or two cache lines, so lookups are loads that hit L1: `tl.gather` compiles to select chains.
"""

# Triton ships no types and its kernels are not Python: what they take is said in their docstrings.
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator, unused-ignore"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

SMS = 132  # of an H100; on a smaller GPU the tile kernel splits K more often than it needs to
ONE_GROUP = 1 << 30  # stands for "one group a row" whatever k is, so that kernels are not compiled again for every k


def span(bits: int) -> int:
    """Return how many codes a chunk holds: the fields of a word (of 2 bits where codes have 3) times 32 words."""
    return 1024 // (2 if bits == 3 else bits)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into the GPU layout; done once, when weights are loaded.

    Args:
        codes: uint8 [n, k], each below 2**bits, on any device.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 [n, words] on the same device; k is padded with code 0 to whole chunks.
    """
    chunks = triton.cdiv(codes.shape[1], span(bits))
    fields = pad(codes, (0, chunks * span(bits) - codes.shape[1])).view(len(codes), chunks, -1, 32)
    if bits != 3:
        return _pack_fields(fields, bits)
    third = pad(fields >> 2, (0, 0, 0, 0, 0, chunks % 2)).view(len(codes), -1, 32, 32)
    return torch.cat([_pack_fields(fields & 3, 2), _pack_fields(third, 1)], dim=1)


def _pack_fields(fields: Tensor, width: int) -> Tensor:
    """Pack fields [n, chunks, fields, 32] of `width` bits into words [n, chunks * 32]."""
    words = torch.zeros_like(fields[:, :, 0], dtype=torch.int32)
    for field in range(fields.shape[2]):
        words |= fields[:, :, field].to(torch.int32) << field * width
    return words.flatten(1)


@triton.jit
def _row_words(chunks, BITS: tl.constexpr):
    """Return the number of words in a row."""
    return (chunks + (tl.cdiv(chunks, 2) if BITS == 3 else 0)) * 32


@triton.jit
def _load_words(row_ptr, chunk, chunks, word, valid, BITS: tl.constexpr):
    """Return the words of a chunk and, of 3-bit codes, those of its third bits, shifted to bit 0 and up."""
    low = tl.load(row_ptr + (chunk * 32 + word), mask=valid, other=0, eviction_policy="evict_first")  # read only once
    if BITS == 3:
        high = tl.load(row_ptr + ((chunks + chunk // 2) * 32 + word), mask=valid, other=0) >> chunk % 2 * 16
    return (low, high) if BITS == 3 else (low,)


@triton.jit
def _bits_at(word, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """Shift right by SHIFT, or left where it is negative, and mask."""
    return (word << -SHIFT if SHIFT < 0 else word >> SHIFT) & MASK


@triton.jit
def _lookup(words, table, FIELD: tl.constexpr, BITS: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the float32 table entries of one field; `table` holds the address of each row's table as int64.

    The kernels are bound by instructions, not only by memory: the code is cut out already multiplied by the entry's 4
    bytes, and where a table row starts at a multiple of its size, `or` replaces a 64-bit addition.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    low = _bits_at(words[0], FIELD * WIDTH - 2, ((1 << WIDTH) - 1) << 2)
    address = table | low if ALIGNED else table + low
    if BITS == 3:
        high = _bits_at(words[1], FIELD - 4, 16)
        address = address | high if ALIGNED else address + high
    return tl.load(address.to(tl.pointer_type(tl.float32), bitcast=True))


@triton.jit
def _load_group(ptr, at):
    """Return scales or zeros as float32, or None where the format has none."""
    return None if ptr is None else tl.load(ptr + at).to(tl.float32)


@triton.jit
def _affine(value, scale, zero):
    """Return (value - zero) * scale, each optional."""
    if zero is not None:
        value = value - zero
    if scale is not None:
        value = value * scale
    return value


@triton.jit(do_not_specialize=["m"])
def _gemv(
    x_ptr,
    words_ptr,
    table_ptr,
    scales_ptr,
    zeros_ptr,
    y_ptr,
    m,
    n,
    k,
    chunks,
    table_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPAN: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Up to TOKENS tokens: a program owns ROWS rows of W and all of k, its warps side by side along k.

    Each thread keeps its float32 sums for ROWS rows and reads x once for all of them. Splitting k over the warps of a
    program fills the GPU without a second pass over partial sums.
    """
    STEADY: tl.constexpr = GROUP % 32 == 0 and (SPAN % GROUP == 0 or GROUP % SPAN == 0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(row, n - 1).to(tl.int64)[:, None, None]  # rows past the end repeat the last one, unmasked
    word = tl.arange(0, 32)[None, None, :]
    table = (table_ptr + rows * table_stride).to(tl.int64, bitcast=True)
    row_ptr = words_ptr + rows * _row_words(chunks, BITS)
    sums = (tl.zeros((ROWS, CHUNKS, 32), tl.float32),) * TOKENS
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)[None, :, None]
        words = _load_words(row_ptr, chunk, chunks, word, chunk < chunks, BITS)
        for field in tl.static_range(SPAN // 32):
            start = chunk * SPAN + field * 32
            if not STEADY or field * 32 % GROUP == 0:  # else the group of the field before goes on
                inside = start if GROUP % 32 == 0 else start + word
                group = rows * tl.cdiv(k, GROUP) + tl.minimum(inside, k - 1) // GROUP
                scale, zero = _load_group(scales_ptr, group), _load_group(zeros_ptr, group)
            value = _affine(_lookup(words, table, field, BITS, ALIGNED), scale, zero)
            at_k = start + word
            for token in tl.static_range(TOKENS):
                at_x = x_ptr + tl.minimum(m - 1, token) * k + at_k
                x = tl.load(at_x, mask=at_k < k, other=0).to(tl.float32)
                added = (sums[0] + value * x,)
                sums = sums[1:] + added  # after TOKENS turns each sum is in its place again
    for token in tl.static_range(TOKENS):
        y = tl.sum(tl.sum(sums[token], 2), 1).to(y_ptr.dtype.element_ty)
        if token < m:
            tl.store(y_ptr + token * n + row, y, mask=row < n)


@triton.jit(do_not_specialize=["m", "share"])
def _tile(
    x_ptr,
    words_ptr,
    table_ptr,
    scales_ptr,
    zeros_ptr,
    y_ptr,
    m,
    n,
    k,
    chunks,
    table_stride,
    share,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPAN: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A program computes TOKENS x ROWS of y over `share` chunks of k; y_ptr is [splits, m, n].

    One field is a [ROWS, 32] tile of W, decoded to x's dtype and given to `tl.dot`. The loop is not pipelined by
    Triton, which would copy the table to shared memory entry by entry; the next words are requested a chunk ahead.
    """
    STEADY: tl.constexpr = GROUP % 32 == 0 and (SPAN % GROUP == 0 or GROUP % SPAN == 0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    rows = tl.minimum(row, n - 1).to(tl.int64)[:, None]  # rows and tokens past the end repeat the last one
    tokens = tl.minimum(token, m - 1).to(tl.int64)[:, None]
    word = tl.arange(0, 32)[None, :]
    table = (table_ptr + rows * table_stride).to(tl.int64, bitcast=True)
    row_ptr = words_ptr + rows * _row_words(chunks, BITS)
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, chunks)
    sums = tl.zeros((TOKENS, ROWS), tl.float32)
    words = _load_words(row_ptr, first, chunks, word, first * 32 + word < last * 32, BITS)
    for chunk in tl.range(first, last, num_stages=1):
        ahead = _load_words(row_ptr, chunk + 1, chunks, word, (chunk + 1) * 32 + word < last * 32, BITS)
        for field in tl.static_range(SPAN // 32):
            start = chunk * SPAN + field * 32
            x = tl.load(x_ptr + tokens * k + start + word, mask=start + word < k, other=0)
            if not STEADY or field * 32 % GROUP == 0:
                inside = start if GROUP % 32 == 0 else start + word
                group = rows * tl.cdiv(k, GROUP) + tl.minimum(inside, k - 1) // GROUP
                scale, zero = _load_group(scales_ptr, group), _load_group(zeros_ptr, group)
            weight = _affine(_lookup(words, table, field, BITS, ALIGNED), scale, zero).to(x.dtype)
            sums = tl.dot(x, tl.trans(weight), sums, input_precision="ieee")
        words = ahead
    at_y = y_ptr + (tl.program_id(2).to(tl.int64) * m + token[:, None]) * n + row[None, :]
    tl.store(at_y, sums.to(y_ptr.dtype.element_ty), mask=(row < n)[None, :] & (token < m)[:, None])


@triton.jit
def _add_splits(parts_ptr, y_ptr, size, splits, BLOCK: tl.constexpr):
    """Sum float32 parts [splits, size] into y [size], in the same order every time."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(parts_ptr + split * size + at, mask=at < size, other=0)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["m"])
def _sparse(x_ptr, rows_ptr, cols_ptr, vals_ptr, y_ptr, m, n, k, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """A program computes one output of TOKENS tokens from one CSR row, BLOCK entries at a time."""
    row = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
    x_row = x_ptr + tl.minimum(token, m - 1).to(tl.int64) * k
    end = tl.load(rows_ptr + row + 1)
    sums = tl.zeros((TOKENS, BLOCK), tl.float32)
    for first in range(tl.load(rows_ptr + row), end, BLOCK):
        entry = first + tl.arange(0, BLOCK)[None, :]
        column = tl.load(cols_ptr + entry, mask=entry < end, other=0)
        value = tl.load(vals_ptr + entry, mask=entry < end, other=0)
        sums += tl.load(x_row + column).to(tl.float32) * value
    tl.store(y_ptr + token.to(tl.int64) * n + row, tl.sum(sums, 1)[:, None], mask=token < m)


# Launch shapes by number of tokens. Chosen from the compiled code (registers, spills, load widths). With codebooks of
# 4 bits on an H100 others were up to a quarter faster, four rows by one warp for 4 tokens 1.3x to 1.6x; groups were not
# timed. No autotuner: it would run kernels during CUDA graph capture and choose differently from run to run.
GEMV_TOKENS = (1, 2, 4)
TILES = (  # (up to this many tokens, TOKENS, ROWS, warps, programs that fit on an SM)
    (16, 16, 64, 4, 4),
    (32, 32, 64, 4, 3),
    (64, 64, 64, 4, 3),
    (128, 128, 128, 8, 1),
    (None, 256, 128, 8, 1),
)
TILES_FLOAT32 = ((16, 16, 32, 4, 4), (None, 32, 32, 4, 4))  # no tensor cores: float32 multiplies and adds
MAX_SPLITS = 8


def gemv_shape(m: int, chunks: int) -> dict[str, int]:
    """Return the constants of `_gemv` and its num_warps: 16 bytes of words a thread, as many warps as k has words."""
    tokens = next(tokens for tokens in GEMV_TOKENS if m <= tokens)
    warps = next((warps for warps in (4, 2) if chunks >= warps * 4), 1)
    rows = 4 if warps == 4 and tokens <= 2 else 2
    return {"TOKENS": tokens, "ROWS": rows, "CHUNKS": warps * 4, "num_warps": warps}


def tile_shape(m: int, n: int, chunks: int, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Return the constants of `_tile` with its num_warps, and how many chunks of k a program takes."""
    shapes = TILES_FLOAT32 if dtype == torch.float32 else TILES
    _, tokens, rows, warps, per_sm = next(shape for shape in shapes if shape[0] is None or m <= shape[0])
    programs = triton.cdiv(m, tokens) * triton.cdiv(n, rows)
    splits = max(1, min(SMS * per_sm // programs, MAX_SPLITS))  # few programs: split k until the SMs are full
    return {"TOKENS": tokens, "ROWS": rows, "num_warps": warps}, triton.cdiv(chunks, splits)


def linear(
    x: Tensor,
    words: Tensor,
    table: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    n: int,
    k: int,
    group_size: int,
) -> Tensor:
    """Return x @ W^T with float32 accumulation; safe to capture in a CUDA graph after one call with the same shapes.

    Up to 4 tokens W is decoded to float32, above that to x's dtype. The same call gives the same bits.

    Args:
        x: [m, k] float16, bfloat16 or float32, contiguous.
        words: int32 from `pack_codes`.
        table: float32 [n, 2**bits] or [1, 2**bits], contiguous.
        scales: [n, k / group_size] float16, bfloat16 or float32, contiguous, or None.
        zeros: like `scales`.
        bits: 2, 3, 4 or 8.
        n: outputs.
        k: inputs.
        group_size: how many weights of a row share a scale and a zero; divides k. Unused without scales and zeros.

    Returns:
        [m, n] of x's dtype.
    """
    m = x.shape[0]
    y = x.new_empty((m, n))
    if m == 0:
        return y
    chunks = triton.cdiv(k, span(bits))
    grouped = 0 < group_size < k and (scales is not None or zeros is not None)
    weights = (words, table, scales, zeros)
    sizes = (m, n, k, chunks, 0 if table.shape[0] == 1 else 1 << bits)
    constants = {
        "BITS": bits,
        "GROUP": group_size if grouped else ONE_GROUP,
        "ALIGNED": table.data_ptr() % (4 << bits) == 0,
        "SPAN": span(bits),
        "enable_fp_fusion": True,  # Triton's default is about to change
    }
    with torch.cuda.device_of(x):
        if m <= GEMV_TOKENS[-1]:
            shape = gemv_shape(m, chunks)
            _gemv[(triton.cdiv(n, shape["ROWS"]),)](x, *weights, y, *sizes, **constants, **shape)
            return y
        shape, share = tile_shape(m, n, chunks, x.dtype)
        grid = (triton.cdiv(n, shape["ROWS"]), triton.cdiv(m, shape["TOKENS"]), triton.cdiv(chunks, share))
        parts = y if grid[2] == 1 else x.new_empty((grid[2], m, n), dtype=torch.float32)
        _tile[grid](x, *weights, parts, *sizes, share, **constants, **shape)
        if parts is not y:
            _add_splits[(triton.cdiv(m * n, 1024),)](parts, y, m * n, grid[2], BLOCK=1024)
    return y


def sparse_linear(x: Tensor, rows: Tensor, cols: Tensor, vals: Tensor) -> Tensor:
    """Return x @ S^T for a sparse S, as SqueezeLLM keeps beside its codes; as deterministic and capturable as `linear`.

    Args:
        x: [m, k] float16, bfloat16 or float32, contiguous.
        rows: int32 [n + 1], where each row of S begins in `cols` and `vals`.
        cols: int32 [entries].
        vals: float32 [entries].

    Returns:
        float32 [m, n].
    """
    (m, k), n = x.shape, len(rows) - 1
    y = x.new_empty((m, n), dtype=torch.float32)
    if m > 0:
        tokens = min(16, triton.next_power_of_2(m))
        with torch.cuda.device_of(x):
            _sparse[(n, triton.cdiv(m, tokens))](x, rows, cols, vals, y, m, n, k, TOKENS=tokens, BLOCK=64)
    return y
