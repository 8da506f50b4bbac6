"""Formats of codes on quantserve's kernels alone: what these take and reach, and what keeps an engine from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from quantserve.checks.linear import quantized_linears
from quantserve.finding import Finding
from quantserve.method import KernelProfile, Method
from quantserve.model.linear import Linear
from quantserve.predict.cpu_kernels import missing_kernels
from quantserve.scheme import Scheme
from quantserve.target import Target

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint

CODEBOOK_DTYPES = ("float16", "bfloat16", "float32")
"""Activations that quantserve's kernels take."""
# Shares of the memory's bandwidth at one row, by bits; 2 and 3 bits have no measurement and are taken to be slower.
_BANDWIDTH = {2: 0.6, 3: 0.7, 4: 0.92, 8: 0.78}


def codebook_method(
    name: str, summary: str, bits: tuple[int, ...], homepage: str, aliases: tuple[str, ...] = ()
) -> Method:
    """A method that vLLM knows by the same name, once the plugin has registered it; see `Method`."""
    return Method(
        name=name,
        summary=summary,
        bits=bits,
        vllm_name=name,
        aliases=aliases,
        minimum_capability=70,
        devices=("cuda", "rocm", "cpu"),
        dtypes=CODEBOOK_DTYPES,
        homepage=homepage,
    )


def codebook_kernel(
    target: Target, bits: int, engine: str, bits_per_weight: float, *, benchmark: str = ""
) -> KernelProfile | None:
    """The profile of a format whose channels share a table of values; None for other engines than vLLM 0.32.

    Args:
        target: the hardware.
        bits: of a code; 2, 3, 4 or 8.
        engine: ``vllm-0.32``.
        bits_per_weight: as packed for the kernel, with scales and zeros.
        benchmark: what `quantserve calibrate` measures.
    """
    if engine != "vllm-0.32" or bits not in _BANDWIDTH:
        return None
    if target.device == "cpu":
        share = _BANDWIDTH[bits]
        return KernelProfile(
            name="quantserve-kernels",
            bits_per_weight=bits_per_weight,
            bandwidth_share=((1, share), (64, share)),
            flops_share=((1, 0.43), (4, 0.85), (16, 0.92), (512, 0.97)),
            source="derived: quantserve-kernels with 4 and 8 bits in groups of 128 on an AMD EPYC with AVX-512, "
            "docs/performance.md (2 and 3 bits: assumed)",
            uncertainty=0.5,
            benchmark=benchmark,
            amx=False,
        )
    return KernelProfile(
        name="quantserve-kernels (Triton)",
        bits_per_weight=bits_per_weight,
        bandwidth_share=((1, 0.5), (256, 0.4)),
        flops_share=((1, 0.1), (256, 0.25), (2048, 0.35)),
        source="assumed: not measured on such a GPU",
        uncertainty=1.0,
        experts=False,
    )


def marlin_kernel(ours: KernelProfile, target: Target) -> KernelProfile:
    """The profile of vLLM's kernels for integer weights of 4 and 8 bits on CUDA GPUs, as assumed from AWQ's."""
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


def kernel_findings(
    code: str,
    label: str,
    target: Target,
    checkpoint: Checkpoint | None = None,
    scheme: Callable[[Checkpoint, Linear], Scheme | None] | None = None,
) -> list[Finding]:
    """What keeps an engine from the kernels of a format: experts on a GPU, and what this machine lacks.

    Args:
        code: the method's name, which starts the codes ``hqq-gpu-experts``, ``hqq-no-kernels`` and ``hqq-plain-torch``.
        label: what messages call the format: ``HQQ``.
        target: the hardware; only a CPU's kernels are compiled when they are installed.
        checkpoint: of the model; without it experts are not looked at.
        scheme: the plugin's ``quantserve_scheme``, for `checkpoint`.
    """
    experts = []
    if target.device != "cpu" and checkpoint is not None and scheme is not None:
        quantized, _ = quantized_linears(checkpoint, lambda linear: scheme(checkpoint, linear))
        experts = sorted({linear.group for linear in quantized if linear.fused == "experts"})
    return [*_gpu_experts(code, label, target, experts), *_missing(code, label, target)]


def _gpu_experts(code: str, label: str, target: Target, layers: list[str]) -> list[Finding]:
    if not layers:
        return []
    message = (
        f"the experts of {len(layers)} layers are quantized, and quantserve's kernels compute {label} experts on CPUs "
        f"only; the target is {target.name}. First: {layers[0]}"
    )
    fix = "serve it on a CPU, or quantize the model with a method that vLLM has for experts, such as awq or fp8"
    return [Finding.error(f"{code}-gpu-experts", message, layers, fix)]


def _missing(code: str, label: str, target: Target) -> list[Finding]:
    """What this machine lacks; nothing where no engine is installed."""
    if find_spec("quantserve_kernels") is None:
        if find_spec("vllm") is None:
            return []
        message = f"quantserve-kernels is not installed here, without which vLLM cannot compute {label} layers"
        fix = f"pip install 'quantserve-{code}[engine]'"
        return [Finding.error(f"{code}-no-kernels", message, ["quantserve-kernels"], fix)]
    reason = missing_kernels() if target.device == "cpu" else ""
    if not reason:
        return []
    message = f"{reason}: every call is plain torch, many times slower than an unquantized model"
    fix = "install a C++ compiler and then quantserve-kernels again"
    return [Finding.warning(f"{code}-plain-torch", message, ["quantserve-kernels"], fix)]
