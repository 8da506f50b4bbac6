"""What the kernels for GPTQ files reach on each kind of device, and what GPTQ costs in quality as published."""

from __future__ import annotations

from dataclasses import replace

from quantserve.api import CpuKernels, KernelProfile, QualityNote, Target, codebook_kernel

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
        return KERNELS.profile(target, ours, _vllm_on_cpu(ours, target)) if bits == 4 else ours
    if bits not in (4, 8) or target.device != "cuda" or (target.capability or 80) < 80:
        return ours
    return replace(
        ours,
        name="Machete or Marlin (vLLM)" if (target.capability or 0) >= 90 else "Marlin (vLLM)",
        bandwidth_share=((1, 0.75), (32, 0.75), (128, 0.65)),
        flops_share=((1, 0.3), (64, 0.45), (256, 0.5)),
        source="assumed as for AWQ, from the Marlin paper (arXiv 2408.11743)",
        benchmark="",
        uncertainty=0.5,
        experts=True,
    )


def _vllm_on_cpu(ours: KernelProfile, target: Target) -> KernelProfile:
    """vLLM's kernel for 4 bits, the one it has for AWQ: quantserve-awq has the source of the numbers."""
    amx = target.has_amx
    return replace(
        ours,
        name="vLLM's GPTQ for CPUs" + " with AMX" * amx,
        bandwidth_share=((1, 0.4 if amx else 0.11),),
        flops_share=((1, 0.02), (16, 0.3), (64, 0.8)) if amx else ((1, 0.05), (16, 0.28), (64, 0.38)),
        source="assumed as for AWQ, which vLLM computes with the same kernel",
        benchmark="",
        amx=True,
        experts=amx,
        uncertainty=1.0,
    )


def quality(bits: int) -> QualityNote | None:
    """GPTQ in groups of 128, as the AWQ paper compares it."""
    perplexity = {3: 6.43, 4: 5.69}.get(bits)
    if perplexity is None:
        return None
    return QualityNote(perplexity, 5.47, "Llama-2 7B, WikiText-2, groups of 128", "AWQ paper, arXiv 2306.00978")
