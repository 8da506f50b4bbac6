"""The light module of the compressed-tensors plugin: checkpoints as llm-compressor writes them.

vLLM's own method serves them on GPUs, and integers of 2, 4 and 8 bits on CPUs, with quantserve's kernel where
activations keep 16 bits. This plugin's engine side serves the others.
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
    dtype_argument,
    hookimpl,
    linears,
)
from quantserve_compressed_tensors import speed
from quantserve_compressed_tensors.config import ENGINE, NAME, config_of
from quantserve_compressed_tensors.limits import (
    SUFFIXES,
    config_findings,
    group_of,
    kernel_choice,
    limit_findings,
    mxfp4_environment,
    scheme_of,
    silent_findings,
    usable_config,
    vllm_problem,
)

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

DTYPES = ("float16", "bfloat16")
DEVICES = ("cuda", "rocm", "cpu")


@hookimpl
def quantserve_method() -> Method:
    """Describe compressed-tensors as vLLM and this plugin serve it."""
    return Method(
        name=NAME,
        summary="llm-compressor's files: W4A16, W8A16, W8A8, FP8, NVFP4 and MXFP4, several in one model",
        bits=(4, 8),
        vllm_name=NAME,
        minimum_capability=75,
        devices=DEVICES,
        dtypes=DTYPES,
        accepts={NAME: dict.fromkeys(DEVICES, (ENGINE,))},
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
    return scheme_of(checkpoint, linear)


@hookimpl
def quantserve_skip_list(checkpoint: Checkpoint) -> SkipList | None:
    """What vLLM builds unquantized: modules of the list ``ignore``, and those that no target matches."""
    config = config_of(checkpoint)
    if config is None:
        return None
    ignore, usable = config.values.get("ignore"), usable_config(checkpoint) is not None
    rest = {one.group: None for one in linears(checkpoint) if group_of(checkpoint, one) is None} if usable else {}
    if not rest or not isinstance(ignore, list | None):
        return SkipList(ignore, "regex", headers="never", key="ignore")
    return SkipList([*(ignore or ()), *rest], "regex", headers="never", key="ignore (or by none of the targets)")


@hookimpl
def quantserve_validate(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterable[Finding]:
    """What vLLM refuses, overlooks or misreads; the core compares the tensors with their schemes."""
    config = config_of(checkpoint)
    if config is None:
        return []  # the core has said so
    if checkpoint.tensors_complete and not any(name.endswith(SUFFIXES) for name in checkpoint.tensors):
        return [
            Finding.error(
                "compressed-tensors-not-quantized",
                "config.json says that the model is quantized, but no linear of the files has quantized tensors",
                ["quantization_config.quant_method"],
                "serve the files as they are, without quantization_config, or export the model again",
            )
        ]
    findings = list(config_findings(config, checkpoint, target))
    if findings or not checkpoint.tensors_complete:
        return findings
    return [
        *limit_findings(checkpoint, model, target),
        *silent_findings(config, checkpoint, model, target),
    ]


@hookimpl
def quantserve_engine_kwargs(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Mapping[str, object]:
    """The engine side that serves the files, and the dtype where a CPU prefers another."""
    own = {"quantization": ENGINE} if vllm_problem(checkpoint, target) else {}
    return {**own, **dtype_argument(checkpoint, model, target, DTYPES)}


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
