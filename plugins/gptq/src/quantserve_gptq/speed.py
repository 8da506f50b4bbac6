"""What the kernels for GPTQ files reach on each kind of device, and what GPTQ costs in quality as published."""

from __future__ import annotations

from dataclasses import replace

from quantserve.api import CpuKernels, KernelProfile, QualityNote, Target, codebook_kernel, marlin_kernel

KERNELS = CpuKernels("gptq", "GPTQ", "quantserve-gptq[engine]")
GROUP = 128
"""Group size of the checkpoints that `recommend` imagines; almost all published ones have it."""


def kernel(target: Target, bits: int, engine: str) -> KernelProfile | None:
    """The profile of the kernel that GPTQ files usually get on this device; None for engines of old."""
    stored = bits + (16 + bits) / GROUP  # with a float16 scale and a zero for each group
    ours = codebook_kernel(target, bits, engine, stored, benchmark="quantserve_gptq._benchmark:make")
    if ours is None:
        return None
    ours = replace(ours, k_multiple=GROUP)
    if target.device == "cpu":
        return KERNELS.profile(target, ours) if bits == 4 else ours
    marlin = bits in (4, 8) and target.device == "cuda" and (target.capability or 80) >= 80
    return marlin_kernel(ours, target) if marlin else ours


def quality(bits: int) -> QualityNote | None:
    """GPTQ in groups of 128, as the AWQ paper compares it."""
    perplexity = {3: 6.43, 4: 5.69}.get(bits)
    if perplexity is None:
        return None
    return QualityNote(perplexity, 5.47, "Llama-2 7B, WikiText-2, groups of 128", "AWQ paper, arXiv 2306.00978")
