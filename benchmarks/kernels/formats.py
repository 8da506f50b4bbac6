"""The formats that are measured: a table, and how to make a random weight of each. A new one is a new row.

The codes of a few hundred channels repeat down the matrix: no kernel's speed depends on them, and nobody waits for
random numbers. Torch is imported where it is needed, so that the command line answers without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.console import BenchError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from quantserve_kernels import PackedWeight

GROUP = 128
NF4_BLOCK = 64
SPARSE = 0.0045  # of the weights, as SqueezeLLM's models keep them apart
REPEAT = 512  # channels after which the codes repeat


@dataclass(frozen=True)
class Format:
    """One row of the tables.

    Attributes:
        name: what the command line and the tables call it.
        about: one line for the report.
        bits: of a code.
        make: a random weight [n, k]; the same one every time.
        default: whether it is measured when nobody names formats.
    """

    name: str
    about: str
    bits: float
    make: Callable[[int, int], PackedWeight]
    default: bool = True


def squeezellm(bits: int, share: float = 0.0) -> Callable[[int, int], PackedWeight]:
    """A codebook per channel, at the quantiles of normal weights, and perhaps a share of sparse ones."""

    def make(n: int, k: int) -> PackedWeight:
        import torch

        from quantserve_kernels import pack

        centres = torch.special.ndtri((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
        table = (0.02 * (0.5 + torch.rand(n, 1, generator=generator())) * centres).float()
        return pack(random_codes(k, bits), table, bits=bits, shape=(n, k), sparse=csr(n, k, share) if share else None)

    return make


def awq(n: int, k: int) -> PackedWeight:
    """From random tensors in AutoAWQ's layout."""
    from quantserve_kernels import from_awq

    return from_awq(*awq_tensors(n, k))


def awq_tensors(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """qweight, qzeros and float16 scales of an AWQ checkpoint, groups of 128; the same ones every time."""
    import torch

    random = generator()

    def words(rows: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, (rows, n // 8), dtype=torch.int32, generator=random)

    scales = 0.004 * (0.5 + torch.rand(k // GROUP, n, generator=random))
    return words(k), words(k // GROUP), scales.half()


def gptq8(n: int, k: int) -> PackedWeight:
    """Eight bits, scale and zero point per group of 128."""
    import torch

    from quantserve_kernels import pack

    random = generator()
    scales = (0.0003 * (0.5 + torch.rand(n, k // GROUP, generator=random))).half()
    zeros = torch.randint(112, 144, scales.shape, generator=random).half()
    table = torch.arange(256, dtype=torch.float32)[None]
    return pack(random_codes(k, 8), table, bits=8, shape=(n, k), scales=scales, zeros=zeros, group_size=GROUP)


def fp4(block: int, scales: str) -> Callable[[int, int], PackedWeight]:
    """E2M1 in blocks, as MXFP4 (32) and NVFP4 (16) have it, with scales of a torch dtype that holds theirs."""

    def make(n: int, k: int) -> PackedWeight:
        import torch

        from quantserve_kernels import pack

        positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        table = torch.cat([positive, -positive])[None]
        scale = 2.0 ** torch.randint(-9, -5, (n, k // block), generator=generator())
        return pack(
            random_codes(k, 4), table, bits=4, shape=(n, k), scales=scale.to(getattr(torch, scales)), group_size=block
        )

    return make


def fp8(n: int, k: int) -> PackedWeight:
    """E4M3 with a scale per channel."""
    import torch

    from quantserve_kernels import from_fp8

    codes = random_codes(k, 8)(0, REPEAT)
    codes = torch.where(codes & 127 == 127, 0, codes).view(torch.float8_e4m3fn)  # which are NaN
    scale = 0.0003 * (0.5 + torch.rand(n, 1, generator=generator()))
    return from_fp8(codes.repeat(-(-n // REPEAT), 1)[:n], scale)


def nf4(n: int, k: int) -> PackedWeight:
    """bitsandbytes' NF4 in blocks of 64."""
    import torch

    from quantserve_kernels import from_nf4

    random = generator()
    packed = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, generator=random)
    absmax = 0.05 * (0.5 + torch.rand(n * k // NF4_BLOCK, generator=random))
    return from_nf4(packed, absmax, (n, k))


def random_codes(k: int, bits: int) -> Callable[[int, int], Tensor]:
    """What `pack` asks for strip by strip: the first channels of the same random codes."""
    import torch

    codes = torch.randint(0, 2**bits, (REPEAT, k), dtype=torch.uint8, generator=generator())
    return lambda first, last: codes[: last - first]


def csr(n: int, k: int, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """rows, cols and vals of a random sparse matrix [n, k]: every position is in it with the probability `share`."""
    import torch

    random = generator()
    gaps = torch.empty(int(n * k * share * 1.1) + 1000).geometric_(share, generator=random).long()
    places = gaps.cumsum(0) - 1
    places = places[places < n * k]
    rows = torch.zeros(n + 1, dtype=torch.int32)
    rows[1:] = torch.bincount(places // k, minlength=n).cumsum(0)
    return rows, (places % k).int(), 0.1 * torch.randn(places.numel(), generator=random)


def generator() -> Generator:
    """Random numbers, the same ones every time."""
    import torch

    return torch.Generator().manual_seed(20261124)


FORMATS = {
    form.name: form
    for form in (
        Format("squeezellm-4", "SqueezeLLM, 4 bits", 4, squeezellm(4)),
        Format("squeezellm-3", "SqueezeLLM, 3 bits", 3, squeezellm(3)),
        Format("squeezellm-4-sparse", f"SqueezeLLM, 4 bits and {SPARSE:.2%} sparse", 4, squeezellm(4, SPARSE)),
        Format("awq", f"AWQ, 4 bits, groups of {GROUP}, float16 scales", 4, awq),
        Format("nf4", f"NF4, blocks of {NF4_BLOCK}", 4, nf4, default=False),
        Format("mxfp4", "MXFP4, blocks of 32", 4, fp4(32, "bfloat16"), default=False),
        Format("nvfp4", "NVFP4, blocks of 16, float16 scales", 4, fp4(16, "float16"), default=False),
        Format("fp8", "FP8 (E4M3), a scale per channel", 8, fp8, default=False),
        Format("gptq-8", f"8 bits with zero points, groups of {GROUP}", 8, gptq8, default=False),
        Format("squeezellm-2", "SqueezeLLM, 2 bits", 2, squeezellm(2), default=False),
    )
}


def choose(names: str | None) -> list[str]:
    """The names of a comma list, in the order of the table; the default ones without a list, or `all`.

    Raises:
        BenchError: an unknown name; lists the known ones.
    """
    if names is None or names == "all":
        return [form.name for form in FORMATS.values() if form.default or names == "all"]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in FORMATS]
    if unknown or not wanted:
        known = ", ".join([*FORMATS, "all"])
        raise BenchError(f"unknown format {', '.join(unknown) or '(none given)'}; known: {known}")
    return [name for name in FORMATS if name in wanted]
