"""The light module of the AWQ plugin: 4-bit AWQ checkpoints, on vLLM's kernels on GPUs and on quantserve's on CPUs.

vLLM reads the files by itself; this plugin finds what it would refuse or misread, and gives the
arguments without which it does not find the settings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from quantserve.api import (
    Checkpoint,
    Finding,
    KernelProfile,
    Method,
    PerformanceProfile,
    QualityNote,
    Target,
    hookimpl,
)
from quantserve_awq import speed
from quantserve_awq.config import Written, config_findings, written_config
from quantserve_awq.kernel import KERNEL_METHOD, METHOD, VLLM_ALIAS, kernel_finding, uses_own_kernel
from quantserve_awq.reference import published
from quantserve_awq.tensors import (
    actual_group,
    has_awq_tensors,
    has_quantized_tensors,
    tensor_findings,
    uses_plain_kernel,
)

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

OWN_NAMES = ("awq", "auto_awq", "awq_marlin")


@hookimpl
def quantserve_method() -> Method:
    """Describe AWQ as vLLM serves it."""
    return Method(
        name="awq",
        summary="activation-aware 4-bit weights (AutoAWQ gemm files), on Marlin, Machete or our CPU kernels",
        bits=(4,),
        # On CPU vLLM refuses its other names (auto_awq, awq_marlin) for the same files.
        vllm_name=METHOD,
        aliases=("auto_awq", "awq_marlin", VLLM_ALIAS),
        minimum_capability=75,
        devices=("cuda", "rocm", "cpu"),
        dtypes=("float16", "bfloat16"),
        homepage="https://arxiv.org/abs/2306.00978",
    )


@hookimpl
def quantserve_detect(checkpoint: Checkpoint) -> bool:
    """Claim what declares AWQ; without a declared method, what has AWQ's tensors or its old config keys."""
    written = written_config(checkpoint)
    if written is not None and written.declares_method:
        return str(written.values["quant_method"]).lower() in OWN_NAMES
    return has_awq_tensors(checkpoint) or (written is not None and "w_bit" in written.values)


@hookimpl
def quantserve_validate(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterable[Finding]:
    """Check settings, tensors, tensor-parallel shards and the kernels of the target."""
    written = written_config(checkpoint, model)
    if not has_quantized_tensors(checkpoint) and checkpoint.tensors_complete:
        return [not_quantized(written)]
    if written is None or str(written.values.get("quant_method") or "awq").lower() not in OWN_NAMES:
        return []  # the core has said so
    findings = [*config_findings(written), *kernel_finding(model, target), *dtype_finding(checkpoint, model, target)]
    if any(finding.code in ("awq-bits", "awq-version") for finding in findings) or not checkpoint.tensors_complete:
        return findings  # every tensor would be reported too
    return [*findings, *tensor_findings(checkpoint, written, target, model)]


@hookimpl
def quantserve_engine_kwargs(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Mapping[str, object]:
    """The method, under the name that gives the kernel, and the dtype of the activations."""
    method = KERNEL_METHOD if uses_own_kernel(model, target) else METHOD
    return {"quantization": method, "dtype": served_dtype(checkpoint, model, target)}


@hookimpl
def quantserve_performance(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> PerformanceProfile | None:
    """RayLLM's published numbers, for exactly what they were measured on."""
    return published(checkpoint, model, target)


@hookimpl
def quantserve_kernel(target: Target, bits: int, engine: str) -> KernelProfile | None:
    """What the kernel of the target reaches."""
    return speed.kernel(target, bits, engine)


@hookimpl
def quantserve_quality(bits: int) -> QualityNote | None:
    """The perplexity of the method's paper."""
    return speed.quality(bits)


@hookimpl
def quantserve_quantizer() -> str:
    """Round to nearest; needs torch."""
    return "quantserve_awq._quantize:quantize"


def served_dtype(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> str:
    """bfloat16 where the checkpoint asks for it and the kernel knows it, or the CPU prefers it; else float16."""
    if target.prefers_bfloat16:
        return "bfloat16"
    written = written_config(checkpoint, model)
    group = actual_group(checkpoint, written)[0] if written else None
    old = target.device == "cuda" and (target.capability or 80) < 80
    plain = group is not None and uses_plain_kernel(group, target)
    return "bfloat16" if checkpoint.torch_dtype == "bfloat16" and not old and not plain else "float16"


def dtype_finding(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> list[Finding]:
    """Says so when float16 activations become bfloat16 for the CPU's sake."""
    if model.dtype is not None or checkpoint.torch_dtype == "bfloat16" or not target.prefers_bfloat16:
        return []
    return [
        Finding.info(
            "awq-dtype",
            f"the model is {checkpoint.torch_dtype or 'of unknown dtype'}; its activations will be bfloat16, which "
            "this CPU multiplies itself",
            ["engine_kwargs.dtype"],
            "set engine_kwargs.dtype to float16 to keep all bits of the activations, more slowly",
        )
    ]


def not_quantized(written: Written | None) -> Finding:
    """The config asks for AWQ, or the checkpoint says it is, and no linear is."""
    said = f"{written.where} says the model is quantized" if written else "the model asks for AWQ"
    return Finding.error(
        "awq-not-quantized",
        f"{said}, but no linear of the checkpoint has AWQ tensors",
        [f"{written.where}: quant_method" if written else "engine_kwargs.quantization"],
        "serve it with quantization: fp16, without a quantization_config, or use an AWQ export of the model",
    )
