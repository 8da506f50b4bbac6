"""The light module of the SqueezeLLM plugin: what `quantserve list`, `check` and `plan` ask.

The method itself, which vLLM no longer has, is in the heavy modules behind ``quantserve_squeezellm:register``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from quantserve.api import (
    CODEBOOK_DTYPES,
    Checkpoint,
    Finding,
    KernelProfile,
    Linear,
    Method,
    PerformanceProfile,
    QualityNote,
    Scheme,
    SkipList,
    Target,
    codebook_method,
    dtype_argument,
    hookimpl,
    kernel_findings,
    method_dtype,
    rayllm_profile,
)
from quantserve_squeezellm import speed
from quantserve_squeezellm.config import NAMES, config_findings, read_settings
from quantserve_squeezellm.format import BITS
from quantserve_squeezellm.reference import CAVEAT, RUNS
from quantserve_squeezellm.tensors import has_tables, stored_scheme, tensor_findings

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

PICKLES = (".pt", ".bin", ".pth")


@hookimpl
def quantserve_method() -> Method:
    """Describe SqueezeLLM as this plugin serves it."""
    summary = "dense-and-sparse 3- and 4-bit weights with a codebook per output channel"
    return codebook_method("squeezellm", summary, BITS, "https://arxiv.org/abs/2306.07629", aliases=NAMES[1:])


@hookimpl
def quantserve_detect(checkpoint: Checkpoint) -> bool:
    """Claim what declares SqueezeLLM; without a declared method, lookup tables or the original `{"wbits": n}`."""
    settings = read_settings(checkpoint)
    if settings.values.get("quant_method"):
        return settings.method in NAMES
    if any(name.endswith(".lookup_table") for name in checkpoint.tensors):
        return True
    return settings.where.endswith("quant_config.json") and "wbits" in settings.values


@hookimpl
def quantserve_scheme(checkpoint: Checkpoint, linear: Linear) -> Scheme | None:
    """One scheme for all linears: vLLM's side builds a model with one width."""
    return stored_scheme(checkpoint)


@hookimpl
def quantserve_skip_list(checkpoint: Checkpoint) -> SkipList:
    """The unquantized modules that a config lists; those that the files hold count without being listed."""
    return SkipList(read_settings(checkpoint).values.get("modules_to_not_convert"), headers="also")


@hookimpl
def quantserve_validate(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterable[Finding]:
    """Check files, settings and sparse parts; the core compares the tensors with their scheme."""
    settings = read_settings(checkpoint, model)
    if settings.method not in NAMES:
        return []  # the core has said so
    original = original_file_findings(checkpoint, model)
    if any(finding.code == "squeezellm-pickle" for finding in original) and not checkpoint.tensors:
        return original
    original += kernel_findings("squeezellm", "SqueezeLLM", target, checkpoint, quantserve_scheme)
    original += dtype_finding(checkpoint, model, target)
    if not has_tables(checkpoint) and checkpoint.tensors_complete:
        return [
            Finding.error(
                "squeezellm-not-quantized",
                "the model asks for SqueezeLLM, but the checkpoint has no lookup tables",
                ["engine_kwargs.quantization"],
                "leave engine_kwargs.quantization out to serve it unquantized, or use a SqueezeLLM export",
            )
        ]
    findings = [*original, *config_findings(settings)]
    if not checkpoint.tensors_complete or any(finding.code == "squeezellm-bits" for finding in findings):
        return findings  # every tensor would be reported too
    return [*findings, *tensor_findings(checkpoint, settings)]


@hookimpl
def quantserve_engine_kwargs(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Mapping[str, object]:
    """The method, which vLLM cannot see in the original files, and the dtype where a CPU prefers another."""
    return {"quantization": "squeezellm", **dtype_argument(checkpoint, model, target, CODEBOOK_DTYPES)}


@hookimpl
def quantserve_performance(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> PerformanceProfile | None:
    """RayLLM's published numbers, for exactly what they were measured on."""
    return rayllm_profile(RUNS, checkpoint, model, target, caveat=CAVEAT)


@hookimpl
def quantserve_kernel(target: Target, bits: int, engine: str) -> KernelProfile | None:
    """What the kernel of the target reaches."""
    profile = speed.kernel(target, bits, engine)
    return replace(profile, k_multiple=8 if bits == 4 else 32) if profile else None


@hookimpl
def quantserve_quality(bits: int) -> QualityNote | None:
    """The perplexity of the method's paper."""
    return speed.quality(bits)


@hookimpl
def quantserve_quantizer() -> str:
    """Weighted k-means; needs torch and quantserve-quantize."""
    return "quantserve_squeezellm.quantizer:SqueezeLLM"


@hookimpl
def quantserve_converter() -> str:
    """The original ``.pt`` files to safetensors; needs torch."""
    return "quantserve_squeezellm._convert:convert"


def dtype_finding(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> list[Finding]:
    """An info where float16 activations become bfloat16 because the CPU only emulates float16."""
    if method_dtype(checkpoint, model, target, CODEBOOK_DTYPES) != "bfloat16":
        return []
    return [
        Finding.info(
            "squeezellm-dtype",
            "the model is float16; its activations will be bfloat16, which this CPU multiplies in hardware",
            ["engine_kwargs.dtype"],
            "set engine_kwargs.dtype to float16 or float32 to keep more bits, more slowly",
        )
    ]


def original_file_findings(checkpoint: Checkpoint, model: ModelConfig) -> list[Finding]:
    """The original files need conversion: pickles, and for LLaMA-1 the tensors of the base model."""
    findings = []
    pickles = sorted(name for name in checkpoint.files if name.endswith(PICKLES))
    if pickles and not any(name.endswith(".safetensors") for name in checkpoint.files):
        severity = Finding.warning if model.allow_pickle else Finding.error
        findings.append(
            severity(
                "squeezellm-pickle",
                f"the weights are a pickle, {pickles[0]}, as SqueezeLLM published them",
                pickles,
                f"quantserve convert --method squeezellm --allow-pickle {checkpoint.source} DESTINATION",
            )
        )
    quantized = any(name.endswith(".qweight") for name in checkpoint.tensors)
    embedding = any("embed" in name or name.endswith("wte.weight") for name in checkpoint.tensors)
    if quantized and not embedding and checkpoint.tensors_complete:
        findings.append(
            Finding.error(
                "squeezellm-linears-only",
                "the file holds only the quantized linears, as published for LLaMA-1 and Vicuna v1.1: embeddings, "
                "norms and lm_head are missing, and vLLM would serve garbage in their place",
                ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"],
                f"quantserve convert --method squeezellm --allow-pickle --base BASE {checkpoint.source} DESTINATION",
            )
        )
    return findings
