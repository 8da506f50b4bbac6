"""What AWQ's kernels reach on each kind of device, and what AWQ costs in quality as published."""

from __future__ import annotations

from dataclasses import replace

from quantserve.api import CpuKernels, KernelProfile, QualityNote, Target

KERNELS = CpuKernels("awq", "AWQ", "quantserve-awq[engine]")
BITS_PER_WEIGHT = 4.16  # 4-bit codes; float16 scale and 4-bit zero point for each group of 128


def kernel(target: Target, bits: int, engine: str) -> KernelProfile | None:
    """The profile of the kernel the engine chooses for AWQ files on this device."""
    if engine == "vllm-0.2.2":
        return KernelProfile(
            name="awq_gemm (vLLM 0.2.2)",
            bits_per_weight=BITS_PER_WEIGHT,
            bandwidth_share=((1, 0.35), (16, 0.25), (64, 0.25)),
            flops_share=((1, 0.05), (16, 0.1), (512, 0.22), (4096, 0.25)),
            source="fitted to the 7B AWQ row of RayLLM's table; it unpacked weights again for every 16 rows",
        )
    if target.device == "cpu":
        return KERNELS.profile(target, _codebook(), VLLM_AMX if target.has_amx else VLLM)
    if target.device == "rocm":
        return KernelProfile(
            name="Triton AWQ (vLLM on ROCm)",
            bits_per_weight=BITS_PER_WEIGHT,
            bandwidth_share=((1, 0.4), (256, 0.35)),
            flops_share=((1, 0.1), (256, 0.25), (2048, 0.3)),
            source="assumed, not measured",
            uncertainty=0.6,
        )
    if (target.capability or 80) < 80:
        return KernelProfile(
            name="AWQ without Marlin (vLLM, before Ampere)",
            bits_per_weight=BITS_PER_WEIGHT,
            bandwidth_share=((1, 0.5), (16, 0.4), (256, 0.35)),
            flops_share=((1, 0.1), (256, 0.25), (2048, 0.35)),
            source="assumed, not measured",
            uncertainty=0.6,
        )
    hopper = (target.capability or 0) >= 90
    return KernelProfile(
        name="Machete or Marlin (vLLM)" if hopper else "Marlin (vLLM)",
        bits_per_weight=BITS_PER_WEIGHT,
        bandwidth_share=((1, 0.75), (32, 0.75), (128, 0.65)),
        flops_share=((1, 0.3), (64, 0.45), (256, 0.5), (2048, 0.5 if hopper else 0.6)),
        source="Marlin paper (arXiv 2408.11743): within 5 % of 3.87x up to batch 32 on large matrices of an A10, about "
        "10 % below float16 at batch 1024; lowered for a model's smaller matrices" + (", Hopper assumed" * hopper),
    )


def _codebook() -> KernelProfile:
    """Quantserve's kernel as it was compiled, with the instruction sets that it may use here."""
    try:
        from quantserve_kernels import status
    except ImportError:
        return CODEBOOK
    found = status()
    made = CODEBOOK_AMX if found.instruction_set == "amx" else CODEBOOK
    return replace(made, name=f"{made.name} ({found.regimes})")


_MEASURED = "docs/performance.md: Llama-2 7B shapes, one thread of an AMD EPYC with AVX-512"
CODEBOOK = KernelProfile(
    name="quantserve-kernels",
    bits_per_weight=BITS_PER_WEIGHT,
    bandwidth_share=((1, 0.92), (64, 0.92)),
    flops_share=((1, 0.43), (4, 0.85), (16, 0.92), (512, 0.97)),
    source=_MEASURED,
    benchmark="quantserve_awq._benchmark:make",
    amx=False,
)
CODEBOOK_AMX = replace(
    CODEBOOK,
    # Up to 4 rows those above, of 12 % of the rate; then 55 cycles to decode 512 weights and 16 to multiply them by 16
    # rows, of which 70 % are reached.
    flops_share=((1, 0.05), (4, 0.1), (8, 0.08), (16, 0.16), (64, 0.38), (512, 0.63)),
    source="estimated from counts of instructions: the kernel with AMX was never timed (docs/performance.md)",
    uncertainty=1.0,
    amx=True,
)
VLLM = KernelProfile(
    name="vLLM's AWQ for CPUs",
    bits_per_weight=BITS_PER_WEIGHT,
    bandwidth_share=((1, 0.11), (64, 0.11)),
    flops_share=((1, 0.05), (16, 0.28), (64, 0.38), (512, 0.42)),
    source=_MEASURED,
    benchmark="quantserve_awq._benchmark:make_vllm",
    experts=False,
)
VLLM_AMX = replace(
    VLLM,
    name="vLLM's AWQ for CPUs with AMX",
    bandwidth_share=((1, 0.4), (64, 0.4)),
    flops_share=((1, 0.02), (16, 0.3), (64, 0.8), (512, 0.85)),
    source="from one rough run on an Intel Xeon, one thread, 0.83 billion parameters: 193 ms for 64 tokens, 120 "
    "tokens/s in batches of 16; batch 1 and 512 tokens assumed",
    uncertainty=1.0,
    experts=True,
)


def quality(bits: int) -> QualityNote | None:
    """As the AWQ paper gives it; files rounded to nearest by this plugin's exporter lose more."""
    if bits != 4:
        return None
    return QualityNote(5.60, 5.47, "Llama-2 7B, WikiText-2, groups of 128", "AWQ paper, arXiv 2306.00978")
