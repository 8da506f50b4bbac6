"""y = x @ W^T on NVIDIA GPUs for a codebook per output channel: what launches codebook.cu.

Up to 128 tokens a kernel decodes W on the way into the tensor cores. Above that W is decoded to memory, a strip that
stays in the GPU's L2 cache at a time, and multiplied by cuBLAS. Weights in groups, of 8 bits, or with a row length that
is no multiple of 8 go through `_triton`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantserve_kernels import _nvrtc

TILE_N, TILE_K = 16, 64  # channels and features of a tile, as in codebook.cu
BITS = (2, 3, 4)
OLDEST = (8, 0)  # compute capability whose tensor cores know bfloat16
STRIP = 16 << 20  # weights that are decoded at a time: 32 MiB of the 50 of an H100's L2
DECODERS = 8  # warps of a block that decodes
MOST_PARTS = 8
OTHERS = ("add_parts", "sparse_product", "add_sparse", "add_sparse_float32", "dequantize", "dequantize_float32")
Sparse = tuple[Tensor, Tensor, Tensor]  # rows int32 [n + 1], cols int32 [entries], vals float32 [entries]: CSR [n, k]


@dataclass(frozen=True)
class Kernel:
    """A compiled shape of `few` or `many` in codebook.cu.

    Attributes:
        tokens: that a block computes, a multiple of 8.
        warps: of a block.
        tiles: of 16 channels that a warp has at a time.
        stages: tiles of x that `many` keeps in shared memory; 0 for `few`.
        per_sm: blocks that a multiprocessor should get: few channels are split along k until it does.
    """

    tokens: int
    warps: int
    tiles: int
    stages: int = 0
    per_sm: int = 0

    @property
    def name(self) -> str:
        """The kernel's, in CUDA."""
        return f"{'many' if self.stages else 'few'}{self.tokens}_{self.warps}_{self.tiles}"

    @property
    def channels(self) -> int:
        """Channels that a block computes."""
        return TILE_N * self.tiles * (self.warps if self.stages else 1)

    @property
    def definition(self) -> str:
        """The line of KERNELS."""
        if self.stages:
            return f"MANY({self.name}, {self.warps}, {self.tiles}, {self.tokens // 8}, {self.stages})"
        return f"FEW({self.name}, {self.warps}, {self.tiles}, {self.tokens // 8})"


# Fastest of those tried on an H100 with the linears of Llama-2 7B. Where there are few channels more warps share k.
NARROW = (
    Kernel(8, 16, 1),
    Kernel(16, 16, 1),
    Kernel(32, 16, 2),
    Kernel(64, 4, 1, stages=4, per_sm=3),
    Kernel(128, 4, 2, stages=2, per_sm=2),
)
WIDE = (Kernel(8, 8, 1), Kernel(16, 8, 1), Kernel(32, 8, 2), *NARROW[3:])
WIDE_PER_SM = 4  # tiles of channels for each multiprocessor from which on they are wide
MOST_TOKENS = WIDE[-1].tokens


class Launcher(Protocol):
    """What starts kernels; the tests have one that runs them on a CPU."""

    def launch(
        self, name: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Tensor | int | None]
    ) -> None:
        """Start a kernel."""


def suits(device: torch.device, bits: int, k: int, group_size: int) -> bool:
    """Whether a weight goes this way: its shape does, and the kernels compile for the device, which is done here."""
    fits = bits in BITS and k % 8 == 0 and group_size in (-1, k) and _has_tensor_cores(device)
    return fits and compiles(device, bits, torch.get_default_dtype() == torch.float16)


@cache
def compiles(device: torch.device, bits: int, half: bool) -> bool:
    """Whether there are kernels for the device; where not, a warning gives the reason once."""
    try:
        _module(device, bits, half)
    except (_nvrtc.CudaError, OSError) as error:
        warnings.warn(
            f"quantserve-kernels: the CUDA kernels for {bits} bits do not compile or load on {device}, so Triton's are "
            f"used, which are slower: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@cache
def _has_tensor_cores(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= OLDEST


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes as codebook.cu wants them; done once, when weights are loaded.

    Args:
        codes: uint8 [n, k], each below 2**bits, on any device.
        bits: 2, 3 or 4.

    Returns:
        int32 [n / 16, k / 64, 32 * bits], n and k rounded up and padded with code 0.
    """
    n, k = codes.shape
    tiles = (-(-n // TILE_N), -(-k // TILE_K))
    padded = pad(codes, (0, tiles[1] * TILE_K - k, 0, tiles[0] * TILE_N - n))
    # [tile of n, half of its channels, g, tile of k, half of its features, t, code]
    fields = padded.view(tiles[0], 2, 8, tiles[1], 2, 4, 8).permute(0, 3, 2, 5, 1, 4, 6).reshape(*tiles, 32, 4, 8)
    octets = torch.zeros(fields.shape[:-1], dtype=torch.int32, device=codes.device)
    for place in range(8):
        octets |= fields[..., place].to(torch.int32) << 4 * place
    if bits == 2:
        octets = octets[..., 0::2] | octets[..., 1::2] << 2
    elif bits == 3:
        fourth = [(octets[..., 3] >> bit & 0x11111111) << 3 for bit in range(3)]
        octets = (octets[..., :3] | torch.stack(fourth, -1)).transpose(-1, -2)
    return octets.reshape(*tiles, 32 * bits).contiguous()


def shapes() -> tuple[Kernel, ...]:
    """All that are compiled."""
    return tuple(dict.fromkeys((*NARROW, *WIDE)))


def defines(bits: int, half: bool) -> dict[str, str]:
    """The preprocessor symbols of codebook.cu; `half`: 16-bit values are float16, else bfloat16."""
    kernels = " ".join(kernel.definition for kernel in shapes())
    return {"BITS": str(bits), "HALF": str(int(half)), "KERNELS": kernels}


@cache
def _module(device: torch.device, bits: int, half: bool) -> _nvrtc.Module:
    """The kernels for a format and a type of x; compiled in a second or two, then kept on disk."""
    source = Path(__file__).with_name("codebook.cu")
    capability = torch.cuda.get_device_capability(device)
    cubin = _nvrtc.compiled(source.read_text(), source.name, capability, defines(bits, half))
    names = [kernel.name for kernel in shapes()]
    return _nvrtc.Module(cubin, device, [*names, *OTHERS])


def linear(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    sparse: Sparse | None,
    bias: Tensor | None,
    bits: int,
    n: int,
    launcher: Launcher | None = None,
) -> Tensor:
    """Return x @ (W + S)^T + bias, accumulated in float32; safe to capture in a CUDA graph after one call like it.

    W is rounded to x's dtype, above 128 tokens S too. There cuBLAS multiplies as torch lets it: partial sums may be
    rounded to 16 bits (`torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction` and `allow_fp16_...`, on by
    default), and float32 becomes TF32 where the caller allowed that. The same call gives the same bits.

    Args:
        x: [m, k] bfloat16, float16 or float32, contiguous.
        codes: from `pack_codes`.
        table: float32 [n, 2**bits] or [1, 2**bits], contiguous.
        sparse: S; a position at most once. Or None.
        bias: float32 [n], contiguous, or None.
        bits: 2, 3 or 4.
        n: outputs.
        launcher: other than this device's.

    Returns:
        [m, n] of x's dtype.
    """
    m = x.shape[0]
    y = x.new_empty((m, n))
    if m == 0:
        return y
    with torch.cuda.device_of(x):
        start = launcher or _module(x.device, bits, x.dtype == torch.float16)
        stride = 0 if table.shape[0] == 1 else 1 << bits
        if m <= MOST_TOKENS and x.dtype != torch.float32:
            _decode_and_multiply(start, x, codes, table, stride, sparse, bias, y)
        else:
            _decode_then_multiply(start, x, codes, table, stride, sparse, y)
            if bias is not None:
                y += bias
    return y


def _decode_and_multiply(
    start: Launcher,
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    stride: int,
    sparse: Sparse | None,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    """Launch the kernel that suits the number of tokens and channels."""
    (m, k), n = x.shape, y.shape[1]
    if x.data_ptr() % 16:
        x = x.clone()
    extra = None
    if sparse is not None:
        extra = x.new_empty((n, m), dtype=torch.float32)
        tokens = min(32, 1 << (m - 1).bit_length())
        grid = (-(-n // 8), -(-m // 32), 1)
        start.launch("sparse_product", grid, 256, (x.T.contiguous(), *sparse, extra, m, n, tokens))
    sms = _multiprocessors(x.device)
    kernel = next(kernel for kernel in (WIDE if n >= TILE_N * WIDE_PER_SM * sms else NARROW) if m <= kernel.tokens)
    blocks = -(-n // kernel.channels)
    count = max(1, min(round(kernel.per_sm * sms / blocks), MOST_PARTS, -(-k // TILE_K)))
    parts = x.new_empty((count, m, n), dtype=torch.float32) if count > 1 else None
    own = (parts,) if kernel.stages else ()
    arguments = (codes, table, x, extra, bias, y, *own, stride, m, n, k)
    start.launch(kernel.name, (blocks, 1, count), kernel.warps * 32, arguments)
    if parts is not None:
        start.launch("add_parts", (-(-m * n // 256), 1, 1), 256, (parts, extra, bias, y, count, m, n))


def _decode_then_multiply(
    start: Launcher, x: Tensor, codes: Tensor, table: Tensor, stride: int, sparse: Sparse | None, y: Tensor
) -> None:
    """W + S in x's dtype, strip by strip, each multiplied by cuBLAS."""
    k, n = x.shape[1], y.shape[1]
    rows = max(TILE_N, STRIP // k // TILE_N * TILE_N)
    strip = x.new_empty((min(rows, n), k))
    suffix = "_float32" if x.dtype == torch.float32 else ""
    for first in range(0, n, rows):
        count = min(rows, n - first)
        arguments = (codes, table, strip, stride, first // TILE_N, count, n, k)
        start.launch(f"dequantize{suffix}", (-(-count // TILE_N), 1, 1), DECODERS * 32, arguments)
        if sparse is not None:
            start.launch(f"add_sparse{suffix}", (-(-count // 8), 1, 1), 256, (strip, *sparse, first, count, k))
        torch.mm(x, strip[:count].T, out=y[:, first : first + count])
