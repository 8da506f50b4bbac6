"""What the kernels reach on each kind of device for the widths of GGUF types."""

from __future__ import annotations

from quantserve.api import KernelProfile, Target

# Codes, and scales and zeros in float32: Q2_K, Q3_K, Q4_K and Q8_0 or Q6_K.
BITS_PER_WEIGHT = {2: 6.0, 3: 5.0, 4: 6.0, 8: 9.0}


def kernel(target: Target, bits: int, engine: str) -> KernelProfile | None:
    """The profile of quantserve's kernels on this device; None for other engines than vLLM 0.32."""
    if engine != "vllm-0.32":
        return None
    if target.device == "cpu":
        return KernelProfile(
            name="quantserve-kernels",
            bits_per_weight=BITS_PER_WEIGHT[bits],
            bandwidth_share=((1, 0.76), (64, 0.76)),
            flops_share=((1, 0.4), (4, 0.8), (16, 0.8), (64, 0.8), (512, 0.9)),
            source="assumed: the profile of the same kernel in quantserve-awq, with more scales",
            uncertainty=0.5,
            experts=False,
        )
    return KernelProfile(
        name="quantserve-kernels (Triton)",
        bits_per_weight=BITS_PER_WEIGHT[bits],
        bandwidth_share=((1, 0.5), (256, 0.4)),
        flops_share=((1, 0.1), (256, 0.25), (2048, 0.35)),
        source="assumed: these kernels have not run on a GPU with GGUF",
        uncertainty=1.0,
        experts=False,
    )
