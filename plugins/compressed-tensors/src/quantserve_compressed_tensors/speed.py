"""What the kernels for compressed-tensors files reach on each kind of device."""

from __future__ import annotations

from dataclasses import replace

from quantserve.api import CpuKernels, KernelProfile, Scheme, Target, codebook_kernel, marlin_kernel
from quantserve_compressed_tensors.config import NAME

KERNELS = CpuKernels(NAME, NAME, "quantserve-compressed-tensors[engine]")
GROUP = 128
"""Group size of the checkpoints that `recommend` imagines."""


def kernel(target: Target, bits: int, engine: str, scheme: Scheme | None) -> KernelProfile | None:
    """The profile of the kernel a model usually gets; without a scheme that of integers with 16-bit activations."""
    ours = codebook_kernel(target, bits, engine, bits + 16 / GROUP)
    if ours is None:
        return None
    ours, rounded = replace(ours, k_multiple=GROUP), scheme is not None and scheme.activation_bits < 16
    if target.device != "cpu" and not rounded:
        return marlin_kernel(ours, target)
    if target.device != "cpu":
        return replace(
            ours,
            name="CUTLASS (vLLM)",
            bandwidth_share=((1, 0.7), (32, 0.7), (128, 0.6)),
            flops_share=((1, 0.3), (64, 0.6), (512, 1.1), (4096, 1.3)),
            source="assumed, not measured",
            uncertainty=0.6,
            experts=True,
        )
    if rounded and scheme is not None and scheme.alternatives(next(iter(scheme.parts)))[0].dtypes == ("I8",):
        source, name = "assumed, not measured", "int8 for CPUs (vLLM)"
        return replace(ours, name=name, source=source, uncertainty=1.0, amx=True, experts=False, k_multiple=1)
    return KERNELS.profile(target, ours) if bits == 4 and (scheme is None or "weight_shape" in scheme.parts) else ours
