"""What SqueezeLLM's kernels reach on each kind of device, and what it costs in quality as published."""

from __future__ import annotations

from dataclasses import replace

from quantserve.api import KernelProfile, QualityNote, Target

BENCHMARK = "quantserve_squeezellm._benchmark:make"
# Codes, and 2^bits float32 of codebook for each output channel of 4096 input features.
BITS_PER_WEIGHT = {3: 3.0625, 4: 4.125}
_MOST_ROWS = 1 << 20


def kernel(target: Target, bits: int, engine: str) -> KernelProfile | None:
    """The profile of quantserve's kernels on this device; for vLLM 0.2.2 that of its own."""
    stored = BITS_PER_WEIGHT[bits]
    if engine == "vllm-0.2.2":
        return _kernel_of_2023(stored) if bits == 4 else None
    if target.device == "cpu":
        return _on_cpu(bits)
    if target.capability is not None and target.capability >= 80:
        return KernelProfile(
            name="quantserve-kernels (CUDA)",
            bits_per_weight=stored,
            bandwidth_share=((1, 0.48), (8, 0.47), (16, 0.42)) if bits == 4 else ((1, 0.49), (8, 0.49), (16, 0.32)),
            flops_share=((1, 0.1), (32, 0.12), (64, 0.16), (128, 0.18), (512, 0.42), (2048, 0.66)),
            source="docs/performance.md: Llama-2 7B shapes, one H100, no sparse part",
            uncertainty=0.5,
            experts=False,
        )
    return KernelProfile(
        name="quantserve-kernels (Triton)",
        bits_per_weight=stored,
        bandwidth_share=((1, 0.5), (256, 0.4)),
        flops_share=((1, 0.1), (256, 0.25), (2048, 0.35)),
        source="assumed: these kernels have not run on such a GPU",
        uncertainty=1.0,
        experts=False,
    )


def _on_cpu(bits: int) -> KernelProfile:
    """The kernel as it was compiled, with the instruction sets that it may use here."""
    made = KernelProfile(
        name="quantserve-kernels",
        bits_per_weight=BITS_PER_WEIGHT[bits],
        bandwidth_share=((1, 0.93), (64, 0.93)) if bits == 4 else ((1, 0.76), (64, 0.76)),
        flops_share=((1, 0.4), (4, 0.87), (16, 0.83), (64, 0.86), (512, 0.97)),
        source="docs/performance.md: Llama-2 7B shapes, one thread of an AMD EPYC with AVX-512, no sparse part",
        benchmark=BENCHMARK,
        amx=False,
    )
    try:
        from quantserve_kernels import status
    except ImportError:
        return made
    found = status()
    made = replace(made, name=f"{made.name} ({found.regimes})")
    if found.instruction_set != "amx":
        return made
    return replace(
        made,
        # Up to 4 rows those above, of 12 % of the rate; then 20 cycles to decode 512 weights and 16 to multiply them by
        # 16 rows, of which 70 % are reached.
        flops_share=((1, 0.05), (4, 0.1), (8, 0.15), (16, 0.3), (64, 0.53), (512, 0.67)),
        source="estimated from counts of instructions: the kernel with AMX was never timed (docs/performance.md)",
        uncertainty=1.0,
        amx=True,
    )


def _kernel_of_2023(stored: float) -> KernelProfile:
    """vLLM 0.2.2 went through all weights again for every row of x: the share falls with the number of rows."""
    once, prompts = 0.26, 0.55  # fitted to decoding and to TTFT of the 7B row of RayLLM's table
    return KernelProfile(
        name="squeezellm_gemm (vLLM 0.2.2), one row after the other",
        bits_per_weight=stored,
        bandwidth_share=((1, once), (16, once / 16), (4096, prompts / 4096), (_MOST_ROWS, prompts / _MOST_ROWS)),
        flops_share=((1, 1.0),),
        source="fitted to the 7B SqueezeLLM row of RayLLM's table",
    )


def quality(bits: int) -> QualityNote | None:
    """As the SqueezeLLM paper gives it for dense-only weights."""
    perplexity = {3: 7.75, 4: 7.21}[bits]
    return QualityNote(perplexity, 7.08, "LLaMA-1 7B, C4, no sparse part", "SqueezeLLM paper, arXiv 2306.07629")
