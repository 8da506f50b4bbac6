"""The light module of the compressed-tensors plugin: checkpoints as llm-compressor writes them.

vLLM's own method serves them; on CPUs integers only, with quantserve's kernel where activations keep 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from quantserve.api import (
    Checkpoint,
    Finding,
    KernelProfile,
    Linear,
    Method,
    Scheme,
    SkipList,
    Target,
    hookimpl,
    method_dtype,
)
from quantserve_compressed_tensors import speed
from quantserve_compressed_tensors.config import NAME, read_config
from quantserve_compressed_tensors.limits import (
    config_findings,
    is_stored,
    kernel_choice,
    limit_findings,
    mxfp4_environment,
    silent_findings,
)
from quantserve_compressed_tensors.schemes import scheme_of
from quantserve_compressed_tensors.targets import groups_of, unmatched

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

DTYPES = ("float16", "bfloat16")


@hookimpl
def quantserve_method() -> Method:
    """Describe compressed-tensors as vLLM and this plugin serve it."""
    return Method(
        name=NAME,
        summary="llm-compressor's files: W4A16, W8A16, W8A8, FP8, NVFP4 and MXFP4, several in one model",
        bits=(4, 8),
        vllm_name=NAME,
        minimum_capability=75,
        devices=("cuda", "rocm", "cpu"),
        dtypes=DTYPES,
        homepage="https://github.com/vllm-project/compressed-tensors",
    )


@hookimpl
def quantserve_detect(checkpoint: Checkpoint) -> bool:
    """Claim what declares the method; where no config declares one, packed weights with their shape beside them."""
    declared = (checkpoint.quantization_config or {}).get("quant_method")
    if declared:
        return str(declared).strip().lower() == NAME
    names = (name.removesuffix("_packed") for name in checkpoint.tensors if name.endswith(".weight_packed"))
    return any(f"{name}_shape" in checkpoint.tensors or f"{name}_global_scale" in checkpoint.tensors for name in names)


@hookimpl
def quantserve_scheme(checkpoint: Checkpoint, linear: Linear) -> Scheme | None:
    """That of the first group whose target matches; None where none does, which vLLM then builds unquantized."""
    groups = groups_of(checkpoint) if is_stored(checkpoint) else None
    group = groups.of(linear) if groups else None
    return scheme_of(group) if group else None


@hookimpl
def quantserve_skip_list(checkpoint: Checkpoint) -> SkipList | None:
    """What vLLM builds unquantized: modules of the list ``ignore``, and those that no target matches."""
    written = read_config(checkpoint)
    if written is None:
        return None
    ignore = written.values.get("ignore")
    rest = unmatched(checkpoint)
    if not rest or not isinstance(ignore, list | None):
        return SkipList(ignore, "regex", headers="never", key="ignore")
    return SkipList([*(ignore or ()), *rest], "regex", headers="never", key="ignore (or by none of the targets)")


@hookimpl
def quantserve_validate(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterable[Finding]:
    """What vLLM refuses, overlooks or misreads; the core compares the tensors with their schemes."""
    written = read_config(checkpoint)
    if written is None:
        return []  # the core has said so
    if not is_stored(checkpoint) and checkpoint.tensors_complete:
        return [
            Finding.error(
                "compressed-tensors-not-quantized",
                "config.json says that the model is quantized, but no linear of the files has quantized tensors",
                ["quantization_config.quant_method"],
                "serve the files as they are, without quantization_config, or export the model again",
            )
        ]
    findings = list(config_findings(written, checkpoint, target))
    if findings or not checkpoint.tensors_complete:
        return findings
    return [
        *limit_findings(checkpoint, model, target),
        *silent_findings(written, checkpoint, model, target),
        *dtype_findings(checkpoint, model, target),
    ]


@hookimpl
def quantserve_engine_kwargs(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Mapping[str, object]:
    """The dtype, where a CPU prefers another."""
    dtype = method_dtype(checkpoint, model, target, DTYPES)
    return {"dtype": dtype} if dtype else {}


@hookimpl
def quantserve_environment(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Mapping[str, str]:
    """The variable that leaves kernels of vLLM out, where another is the better or the right one."""
    if target.device == "cpu":
        return kernel_choice(checkpoint, model, target).environment
    return mxfp4_environment(checkpoint, model, target)


@hookimpl
def quantserve_kernel(target: Target, bits: int, engine: str, scheme: Scheme | None) -> KernelProfile | None:
    """What the kernel of the target reaches."""
    return speed.kernel(target, bits, engine, scheme)


def dtype_findings(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> list[Finding]:
    """An info where a CPU gets bfloat16 in place of float16."""
    if not target.prefers_bfloat16 or method_dtype(checkpoint, model, target, DTYPES) != "bfloat16":
        return []
    return [
        Finding.info(
            "compressed-tensors-dtype",
            "the model is float16; its activations will be bfloat16, which this CPU multiplies in hardware",
            ["engine_kwargs.dtype"],
            "set engine_kwargs.dtype to float16 to keep all bits of the activations, more slowly",
        )
    ]
