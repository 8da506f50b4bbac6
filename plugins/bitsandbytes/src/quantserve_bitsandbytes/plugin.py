"""The light module of the bitsandbytes plugin: what `quantserve list`, `check` and `plan` ask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from quantserve.api import (
    CODEBOOK_DTYPES,
    Checkpoint,
    Finding,
    KernelProfile,
    Linear,
    Method,
    Scheme,
    Target,
    codebook_kernel,
    codebook_method,
    dtype_argument,
    hookimpl,
    kernel_findings,
    linears,
)
from quantserve_bitsandbytes import THEIRS
from quantserve_bitsandbytes.format import BLOCK, Settings, settings, stored

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

_MARKS, _STATE = (".SCB", ".quant_map"), ".quant_state.bitsandbytes__"


@hookimpl
def quantserve_method() -> Method:
    """Describe bitsandbytes as this plugin serves it."""
    summary = "NF4, FP4 (also with double quantization) and int8 of bitsandbytes"
    homepage = "https://github.com/bitsandbytes-foundation/bitsandbytes"
    return codebook_method("bitsandbytes", summary, (4, 8), homepage, aliases=("bnb",))


@hookimpl
def quantserve_detect(checkpoint: Checkpoint) -> bool:
    """Claim what declares bitsandbytes; where no method is declared, its tensors."""
    declared = _config(checkpoint).get("quant_method")
    return str(declared).lower() == "bitsandbytes" if declared else _quantized(checkpoint)


@hookimpl
def quantserve_scheme(checkpoint: Checkpoint, linear: Linear) -> Scheme | None:
    """One for all; the core takes for plain what the files hold so, as in Unsloth's dynamic ones."""
    try:
        return stored(_settings(checkpoint)) if _quantized(checkpoint) else None
    except ValueError:
        return None  # `quantserve_validate` gives the reason


@hookimpl
def quantserve_validate(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterator[Finding]:
    """What is peculiar to bitsandbytes: quantization at load time, blocks of the flat weight, LLM.int8()."""
    theirs = _theirs(target)
    if not theirs:
        yield from kernel_findings("bitsandbytes", "bitsandbytes", target, checkpoint, quantserve_scheme)
    if not _config(checkpoint):
        return  # the core says that it is missing
    try:
        made = _settings(checkpoint)
    except ValueError as error:
        fix = "correct it, or save the quantized model again with transformers"
        yield Finding.error("bitsandbytes-settings", f"quantization_config: {error}", ["quantization_config"], fix)
        return
    if not _quantized(checkpoint):
        if checkpoint.tensors_complete and not theirs:
            yield Finding.error(
                "bitsandbytes-online",
                "the config asks to quantize these plain weights while they are loaded, which only vLLM's plugin does, "
                "on GPUs",
                ["quantization_config"],
                "save the quantized model (model.save_pretrained), remove quantization_config and serve it "
                "unquantized, or pip install vllm-bnb-plugin on a machine with a GPU",
            )
        return
    ranks = model.tensor_parallel_size
    if theirs and ranks > 1:
        yield Finding.error(
            "bitsandbytes-plugin-ranks",
            f"vllm-bnb-plugin, which is installed here, does not split quantized files over {ranks} ranks",
            ["scaling_config.num_workers"],
            "set num_workers to 1, or uninstall vllm-bnb-plugin: quantserve's kernels split them",
        )
    if made.kind == "int8":
        if not theirs:
            yield Finding.info(
                "bitsandbytes-weight-only",
                "the int8 weights are multiplied with 16-bit activations; LLM.int8() rounds those to 8 bits but for "
                "outliers (llm_int8_threshold), so answers may differ from transformers' within its rounding",
                ["llm_int8_threshold"],
            )
        return
    uneven = [f"{one.name}: K {one.k}" for one in linears(checkpoint) if one.k % BLOCK and _has(checkpoint, one)]
    if uneven and not theirs:
        message = (
            f"blocks of {BLOCK} go from one row of the weight into the next, which is not served. First: {uneven[0]}"
        )
        fix = "leave these linears out (llm_int8_skip_modules), or use load_in_8bit"
        yield Finding.error("bitsandbytes-block", message, uneven, fix)


@hookimpl
def quantserve_engine_kwargs(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Mapping[str, object]:
    """The dtype where a CPU prefers another than the files', and the loader of vLLM's plugin."""
    loader = {"load_format": "bitsandbytes"} if _theirs(target) else {}
    return {**dtype_argument(checkpoint, model, target, CODEBOOK_DTYPES), **loader}


@hookimpl
def quantserve_quantizer() -> str:
    """NF4; needs torch, quantserve-kernels and quantserve-quantize."""
    return "quantserve_bitsandbytes.quantizer:Nf4"


@hookimpl
def quantserve_kernel(target: Target, bits: int, engine: str) -> KernelProfile | None:
    """Four bits with a float32 scale for 64 weights, eight with one for a channel."""
    kept = 4 + 32 / BLOCK if bits == 4 else 8.0
    made = codebook_kernel(target, bits, engine, kept, benchmark="quantserve_bitsandbytes._benchmark:make")
    return replace(made, name="vllm-bnb-plugin", benchmark="") if made and _theirs(target) else made


def _config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    return checkpoint.quantization_config or {}


def _settings(checkpoint: Checkpoint) -> Settings:
    """The settings; ValueError where they are wrong, or not those of the files."""
    made = settings(_config(checkpoint))
    held = {"int8" if name.endswith(".SCB") else name.partition(_STATE)[2] for name in checkpoint.tensors} - {""}
    if held and made.kind not in held:
        raise ValueError(f"it says {made.kind}, and the files hold {' and '.join(sorted(held))}")
    return made


def _quantized(checkpoint: Checkpoint) -> bool:
    return any(name.endswith(_MARKS) for name in checkpoint.tensors)


def _has(checkpoint: Checkpoint, linear: Linear) -> bool:
    return any(f"{name}.weight.absmax" in checkpoint.tensors for name in linear.names)


def _theirs(target: Target) -> bool:
    """Whether vLLM's own plugin serves the model: on GPUs, where it is installed."""
    return target.device != "cpu" and find_spec(THEIRS) is not None
