"""The light module of the GPTQ plugin: 2-, 3-, 4- and 8-bit GPTQ checkpoints.

vLLM's own GPTQ serves symmetric files of 4 and 8 bits on GPUs, and on CPUs where its kernel is the better one; this
plugin's engine side serves the others, and those of CPUs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from quantserve.api import (
    Checkpoint,
    Finding,
    KernelProfile,
    Linear,
    Method,
    QualityNote,
    Scheme,
    SkipList,
    Target,
    check_mixed_layers,
    dtype_argument,
    hookimpl,
)
from quantserve_gptq import speed
from quantserve_gptq.config import BITS, FILE_NAME, NAMES, Written, config_findings
from quantserve_gptq.limits import choose, is_stored, limit_findings, scheme_of, setting, tensor_findings

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

ENGINE = "gptq_codebook"
"""The argument that leads to this plugin's engine side."""
DTYPES = ("float16", "bfloat16")
ARGUMENTS = ("gptq", "gptq_marlin", "auto_gptq", ENGINE)


@hookimpl
def quantserve_method() -> Method:
    """Describe GPTQ as vLLM and this plugin serve it."""
    return Method(
        name="gptq",
        summary="2-, 3-, 4- and 8-bit weights rounded one input after the other (GPTQ, GPTQModel, AutoRound files)",
        bits=BITS,
        vllm_name="gptq",
        aliases=NAMES[1:],
        minimum_capability=70,
        devices=("cuda", "rocm", "cpu"),
        dtypes=DTYPES,
        accepts={name: dict.fromkeys(("cuda", "rocm", "cpu"), ARGUMENTS) for name in NAMES},
        homepage="https://arxiv.org/abs/2210.17323",
    )


@hookimpl
def quantserve_detect(checkpoint: Checkpoint) -> bool:
    """Claim what declares GPTQ; without a declared method, its config file's keys or its tensors."""
    written = Written.read(checkpoint)
    if written is not None and written.values.get("quant_method"):
        return written.method in NAMES
    if written is not None and written.where.endswith(FILE_NAME) and {"bits", "desc_act"} <= written.values.keys():
        return True
    for name, tensor in checkpoint.tensors.items():
        if name.endswith(".qweight"):
            scales = checkpoint.tensors.get(f"{name.removesuffix('qweight')}scales")
            return scales is not None and len(tensor.shape) == 2 and scales.shape[-1:] == tensor.shape[-1:]
    return False


@hookimpl
def quantserve_scheme(checkpoint: Checkpoint, linear: Linear) -> Scheme | None:
    """By the rules of the config: linears may have several widths and groups, or none."""
    return scheme_of(checkpoint, linear)


@hookimpl
def quantserve_skip_list(checkpoint: Checkpoint) -> SkipList:
    """GPTQ has no list: what the files hold unquantized is unquantized."""
    return SkipList(None)


@hookimpl
def quantserve_validate(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterable[Finding]:
    """Check settings and what the engine can serve; the core compares the tensors with their scheme."""
    written = Written.read(checkpoint, model)
    if not is_stored(checkpoint) and checkpoint.tensors_complete:
        return [
            Finding.error(
                "gptq-not-quantized",
                "the model asks for GPTQ, or says that it is, but no linear of the checkpoint has GPTQ's tensors",
                ["engine_kwargs.quantization" if written is None else f"{written.where}: quant_method"],
                "serve it with quantization: fp16, without a quantization_config, or use a GPTQ export of the model",
            )
        ]
    if written is None or written.method not in NAMES:
        return []  # the core has said so
    if wrong := config_findings(written):
        return wrong
    choice = choose(checkpoint, model, target)
    if not checkpoint.tensors_complete:
        return choice.findings
    return [
        *choice.findings,
        *limit_findings(checkpoint, model, own=choice.own),
        *check_mixed_layers(checkpoint, partial(setting, checkpoint), code="gptq-mixed-layer"),
        *tensor_findings(checkpoint, written),
    ]


@hookimpl
def quantserve_engine_kwargs(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Mapping[str, object]:
    """The engine side that serves the files, and the dtype where a CPU prefers another."""
    own = {"quantization": ENGINE} if choose(checkpoint, model, target).own else {}
    return {**own, **dtype_argument(checkpoint, model, target, DTYPES)}


@hookimpl
def quantserve_environment(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Mapping[str, str]:
    """vLLM's variable, by which a plan is predicted with the kernel it leads to."""
    return choose(checkpoint, model, target).environment


@hookimpl
def quantserve_kernel(target: Target, bits: int, engine: str) -> KernelProfile | None:
    """What the kernel of the target reaches."""
    return speed.kernel(target, bits, engine)


@hookimpl
def quantserve_quality(bits: int) -> QualityNote | None:
    """The perplexity of GPTQ in the AWQ paper."""
    return speed.quality(bits)


@hookimpl
def quantserve_quantizer() -> str:
    """Error after error spread by the Hessian; needs torch, quantserve-kernels and quantserve-quantize."""
    return "quantserve_gptq.quantizer:GPTQ"
