"""What the kernels for compressed-tensors files reach on each kind of device."""

from __future__ import annotations

from dataclasses import replace

from quantserve.api import CpuKernels, KernelProfile, Scheme, Target, codebook_kernel
from quantserve_compressed_tensors.config import NAME

KERNELS = CpuKernels(NAME, NAME, "quantserve-compressed-tensors[engine]")
PREDICTED_GROUP = 128
"""Group size of the checkpoints that `recommend` imagines."""


def kernel(target: Target, bits: int, engine: str, scheme: Scheme | None) -> KernelProfile | None:
    """The profile of the kernel a model usually gets; without a scheme that of integers with 16-bit activations."""
    ours = codebook_kernel(target, bits, engine, bits + 16 / PREDICTED_GROUP)
    if ours is None or bits not in (4, 8):
        return None
    ours = replace(ours, k_multiple=PREDICTED_GROUP)
    rounded = scheme is not None and scheme.activation_bits < 16
    if target.device == "cpu":
        if rounded and "I8" in {part.dtypes[0] for part in scheme.alternatives("weight")}:  # type: ignore[union-attr]
            return _int8_on_cpu(ours)
        integers = scheme is None or "weight_shape" in scheme.parts
        return KERNELS.profile(target, ours, _vllm_on_cpu(ours, target), bits) if bits == 4 and integers else ours
    return replace(
        ours,
        name="CUTLASS (vLLM)" if rounded else "Machete or Marlin (vLLM)",
        bandwidth_share=((1, 0.7), (32, 0.7), (128, 0.6)),
        flops_share=((1, 0.3), (64, 0.6), (512, 1.1), (4096, 1.3))
        if rounded
        else ((1, 0.3), (64, 0.45), (256, 0.5), (2048, 0.55)),
        source="assumed, not measured" if rounded else "assumed as for AWQ, from the Marlin paper (arXiv 2408.11743)",
        uncertainty=0.6,
        experts=True,
    )


def _vllm_on_cpu(ours: KernelProfile, target: Target) -> KernelProfile:
    """vLLM's kernel for 4 bits, the one it has for AWQ; see quantserve-awq for where the numbers come from."""
    amx = target.has_amx
    return replace(
        ours,
        name="vLLM's W4A16 for CPUs" + " with AMX" * amx,
        bandwidth_share=((1, 0.4), (64, 0.4)) if amx else ((1, 0.11), (64, 0.11)),
        flops_share=((1, 0.02), (16, 0.3), (64, 0.8), (512, 0.85)) if amx else ((1, 0.05), (16, 0.28), (512, 0.42)),
        source="assumed as for AWQ, which vLLM computes with the same kernel",
        uncertainty=1.0,
        amx=True,
        experts=amx,
    )


def _int8_on_cpu(ours: KernelProfile) -> KernelProfile:
    return replace(
        ours,
        name="int8 for CPUs (vLLM)",
        bits_per_weight=8,
        source="assumed, not measured",
        uncertainty=1.0,
        amx=True,
        experts=False,
        k_multiple=1,
    )
