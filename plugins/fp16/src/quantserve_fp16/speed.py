"""What unquantized linears reach on each kind of device, as shares of memory bandwidth and of the dense 16-bit rate."""

from __future__ import annotations

from quantserve.api import KernelProfile, Target

BENCHMARK = "quantserve_fp16._benchmark:make"


def kernel(target: Target, bits: int, engine: str) -> KernelProfile | None:
    """The profile of the 16-bit GEMM that the engine uses on this device."""
    if engine == "vllm-0.2.2":
        return KernelProfile(
            name="cuBLAS (vLLM 0.2.2)",
            bits_per_weight=16.0,
            bandwidth_share=((1, 0.8), (256, 0.8)),
            flops_share=((1, 0.4), (512, 0.6), (4096, 0.65)),
            source="assumed: usual for cuBLAS on an A100",
        )
    if target.device == "cpu":
        return KernelProfile(
            name="oneDNN bfloat16 (vLLM)",
            bits_per_weight=16.0,
            bandwidth_share=((1, 0.83), (64, 0.83)),
            flops_share=((1, 0.08), (4, 0.25), (16, 0.57), (64, 0.86), (512, 1.0)),
            source="docs/performance.md: vLLM's bf16 linear, Llama-2 7B shapes, one thread of an AMD EPYC with AVX-512",
            uncertainty=0.35,
            benchmark=BENCHMARK,
        )
    if target.device == "rocm":
        return KernelProfile(
            name="hipBLASLt (vLLM)",
            bits_per_weight=16.0,
            bandwidth_share=((1, 0.7), (256, 0.65)),
            flops_share=((1, 0.3), (512, 0.5), (4096, 0.6)),
            source="assumed, not measured",
            uncertainty=0.5,
        )
    return KernelProfile(
        name="cuBLAS (vLLM)",
        bits_per_weight=16.0,
        bandwidth_share=((1, 0.85), (256, 0.82)),
        flops_share=((1, 0.4), (256, 0.55), (2048, 0.7)),
        source="assumed: usual for cuBLAS on data-centre GPUs",
    )
