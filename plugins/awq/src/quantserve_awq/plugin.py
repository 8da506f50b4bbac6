"""The light module of the AWQ plugin: 4-bit AWQ checkpoints, on vLLM's kernels on GPUs, on either's on CPUs.

vLLM reads the files by itself; this plugin finds what it would refuse or misread, and chooses the kernel and the dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from quantserve.api import (
    Checkpoint,
    Finding,
    KernelChoice,
    KernelProfile,
    Linear,
    Method,
    PerformanceProfile,
    QualityNote,
    Scheme,
    SkipList,
    Target,
    dtype_argument,
    hookimpl,
    method_dtype,
    rayllm_profile,
    served_dtype,
)
from quantserve_awq import speed
from quantserve_awq.config import NAMES, REFUSED, Written, config_findings
from quantserve_awq.limits import limit_findings, uses_plain_kernel, vllm_cpu_problems
from quantserve_awq.reference import CAVEAT, RUNS
from quantserve_awq.tensors import (
    actual_group,
    has_awq_tensors,
    has_quantized_tensors,
    stored_scheme,
    tensor_findings,
)

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

PREDICTED_GROUP = 128
"""Group size of the checkpoints that `recommend` imagines; almost all published ones have it."""
DTYPES = ("float16", "bfloat16")
# vLLM's plain AWQ kernel computes in float16 only.
PLAIN_DTYPES = ("float16",)
# The arguments vLLM 0.32 takes for files that declare awq; on CPUs only the name itself.
GPU_ARGUMENTS = ("awq", "awq_marlin", "auto_awq", "marlin")


@hookimpl
def quantserve_method() -> Method:
    """Describe AWQ as vLLM serves it."""
    return Method(
        name="awq",
        summary="activation-aware 4-bit weights (AutoAWQ gemm files), on Marlin, Machete or CPU kernels",
        bits=(4,),
        # On CPU vLLM refuses its other names (auto_awq, awq_marlin) for the same files.
        vllm_name="awq",
        aliases=("auto_awq", "awq_marlin"),
        minimum_capability=75,
        devices=("cuda", "rocm", "cpu"),
        dtypes=DTYPES,
        accepts={"awq": {"cuda": GPU_ARGUMENTS, "rocm": GPU_ARGUMENTS}},
        homepage="https://arxiv.org/abs/2306.00978",
    )


@hookimpl
def quantserve_detect(checkpoint: Checkpoint) -> bool:
    """Claim what declares AWQ; without a declared method, what has AWQ's tensors or its old config keys."""
    written = Written.read(checkpoint)
    if written is not None and written.declares_method:
        return written.method in NAMES
    return has_awq_tensors(checkpoint) or (written is not None and "w_bit" in written.values)


@hookimpl
def quantserve_scheme(checkpoint: Checkpoint, linear: Linear) -> Scheme | None:
    """One scheme for all linears; vLLM knows no AWQ with several group sizes."""
    return stored_scheme(checkpoint)


@hookimpl
def quantserve_skip_list(checkpoint: Checkpoint) -> SkipList | None:
    """The modules that AutoAWQ left unquantized."""
    written = Written.read(checkpoint)
    return SkipList(written.values.get("modules_to_not_convert")) if written else None


@hookimpl
def quantserve_validate(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterable[Finding]:
    """Check settings and what the kernels of the target take; the core compares the tensors with their scheme."""
    written = Written.read(checkpoint, model)
    if not has_quantized_tensors(checkpoint) and checkpoint.tensors_complete:
        return [not_quantized(written)]
    if written is None or written.method not in NAMES:
        return []  # the core has said so
    choice = kernel_choice(checkpoint, model, target)
    findings = [*config_findings(written), *choice.findings, *dtype_findings(checkpoint, model, target)]
    if any(finding.code in REFUSED for finding in findings) or not checkpoint.tensors_complete:
        return findings  # every tensor would be reported too
    findings += tensor_findings(checkpoint, written)
    return [*findings, *limit_findings(checkpoint, written, target, model, own_kernel=choice.own)]


@hookimpl
def quantserve_engine_kwargs(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Mapping[str, object]:
    """The dtype where the kernel changes vLLM's choice."""
    return dtype_argument(checkpoint, model, target, kernel_dtypes(checkpoint, model, target))


@hookimpl
def quantserve_environment(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Mapping[str, str]:
    """The variable that leaves vLLM's own kernels out, where quantserve's is the better one."""
    return kernel_choice(checkpoint, model, target).environment


@hookimpl
def quantserve_performance(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> PerformanceProfile | None:
    """RayLLM's published numbers, for exactly what they were measured on."""
    return rayllm_profile(RUNS, checkpoint, model, target, caveat=CAVEAT)


@hookimpl
def quantserve_kernel(target: Target, bits: int, engine: str) -> KernelProfile | None:
    """What the kernel of the target reaches."""
    profile = speed.kernel(target, bits, engine)
    return replace(profile, k_multiple=PREDICTED_GROUP) if profile else None


@hookimpl
def quantserve_quality(bits: int) -> QualityNote | None:
    """The perplexity of the method's paper."""
    return speed.quality(bits)


@hookimpl
def quantserve_quantizer() -> str:
    """Activation-aware scales, clipping, rounding to nearest; needs torch."""
    return "quantserve_awq.quantizer:Awq"


def kernel_choice(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> KernelChoice:
    """quantserve's kernel or vLLM's for this model."""
    written = Written.read(checkpoint, model)
    if written is None or target.device != "cpu":
        return speed.KERNELS.choose(model, target)
    return speed.KERNELS.choose(model, target, *vllm_cpu_problems(checkpoint, written, target, model))


def kernel_dtypes(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> tuple[str, ...]:
    """The activation dtypes of the kernel that the linears get."""
    written = Written.read(checkpoint, model)
    group = actual_group(checkpoint, written)[0] if written else None
    plain = written is not None and group is not None and uses_plain_kernel(group, written.symmetric, target)
    return PLAIN_DTYPES if plain else DTYPES


def dtype_findings(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> list[Finding]:
    """An info where a CPU gets bfloat16 in place of float16, an error where the plain kernel does not get float16."""
    dtypes = kernel_dtypes(checkpoint, model, target)
    chosen = method_dtype(checkpoint, model, target, dtypes)
    if chosen == "bfloat16" and target.prefers_bfloat16:
        return [
            Finding.info(
                "awq-dtype",
                "the model is float16; its activations will be bfloat16, which this CPU multiplies in hardware",
                ["engine_kwargs.dtype"],
                "set engine_kwargs.dtype to float16 to keep all bits of the activations, more slowly",
            )
        ]
    served = served_dtype(checkpoint, model, target)
    if dtypes == PLAIN_DTYPES and chosen is None and served.name in DTYPES and served.name not in dtypes:
        asked = model.dtype is not None
        return [
            Finding.error(
                "awq-plain-kernel-dtype",
                f"vLLM's plain AWQ kernel, which these settings lead to, computes in float16 only; this model would "
                f"run in {served.name}, decided by {served.source}",
                ["engine_kwargs.dtype"],
                "set engine_kwargs.dtype to float16, or leave it out"
                if asked
                else "use an export with zero_point true and group_size 128",
            )
        ]
    return []


def not_quantized(written: Written | None) -> Finding:
    """The config asks for AWQ, or the checkpoint says it is, and no linear is."""
    said = f"{written.where} says the model is quantized" if written else "the model asks for AWQ"
    return Finding.error(
        "awq-not-quantized",
        f"{said}, but no linear of the checkpoint has AWQ tensors",
        [f"{written.where}: quant_method" if written else "engine_kwargs.quantization"],
        "serve it with quantization: fp16, without a quantization_config, or use an AWQ export of the model",
    )
