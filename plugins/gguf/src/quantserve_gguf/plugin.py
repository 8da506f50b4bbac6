"""The light module of the GGUF plugin: what `quantserve list`, `check` and `plan` ask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from quantserve.api import (
    Checkpoint,
    Finding,
    KernelProfile,
    Linear,
    Method,
    Reader,
    Scheme,
    Target,
    codebook_kernel,
    dtype_argument,
    hookimpl,
    kernel_findings,
    once,
)
from quantserve_gguf.blocks import BROUGHT, MIXED, SCHEMES, served_types
from quantserve_gguf.families import FAMILIES
from quantserve_gguf.reader import read

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

BITS_PER_WEIGHT = {2: 6.0, 3: 5.0, 4: 6.0, 8: 9.0}
"""As the kernels keep Q2_K, Q3_K, Q4_K, and between Q8_0 and Q6_K."""
DTYPES = ("float16", "bfloat16", "float32")


@hookimpl
def quantserve_method() -> Method:
    """Describe GGUF as this plugin serves it."""
    return Method(
        name="gguf",
        summary="llama.cpp's files: Q4_0 to Q8_0, Q2_K to Q6_K, IQ4_NL and IQ4_XS, with config and tokenizer inside",
        bits=(2, 3, 4, 8),
        vllm_name="gguf",
        devices=("cuda", "cpu"),
        dtypes=DTYPES,
        families=("mistral", "gemma3", *(family.model_type for family in FAMILIES.values())),
        homepage="https://github.com/ggml-org/ggml/blob/master/docs/gguf.md",
    )


@hookimpl
def quantserve_reader() -> Reader:
    """Read ``.gguf`` files."""
    return Reader((".gguf",), read)


@hookimpl
def quantserve_detect(checkpoint: Checkpoint) -> bool:
    """Claim what `read` read."""
    return any(name.endswith(".gguf") for name in checkpoint.container)


@hookimpl
def quantserve_scheme(checkpoint: Checkpoint, linear: Linear) -> Scheme | None:
    """By the type of its tensor; plain floats have none."""
    tensor = checkpoint.tensors.get(f"{linear.name}.weight")
    if tensor is None:
        return None
    brought = _served(checkpoint).get(linear.name) == MIXED.name
    return (BROUGHT if brought else SCHEMES).get(tensor.dtype)


@hookimpl
def quantserve_validate(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterable[Finding]:
    """What keeps an engine from serving the file; the core and the reader have judged the file itself."""
    if not checkpoint.container:
        return [
            Finding.error(
                "gguf-no-file",
                "the model asks for GGUF, but no .gguf file was read",
                ["engine_kwargs.quantization"],
                "name the file, or leave engine_kwargs.quantization out",
            )
        ]
    odd = [name for name, tensor in checkpoint.tensors.items() if _is_norm(name) and tensor.dtype in SCHEMES]
    findings = [
        Finding.error("gguf-quantized-norm", f"{len(odd)} norms or biases are quantized, such as {odd[0]}", odd[:20])
    ] if odd else []  # fmt: skip
    return [*findings, *kernel_findings("gguf", "GGUF", target), *_untested(target)]


@hookimpl
def quantserve_engine_kwargs(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Mapping[str, object]:
    """The loader of these files, and the dtype where a CPU prefers another."""
    return {"load_format": "gguf", **dtype_argument(checkpoint, model, target, DTYPES)}


@hookimpl
def quantserve_kernel(target: Target, bits: int, engine: str) -> KernelProfile | None:
    """What the kernel of the target reaches."""
    return codebook_kernel(target, bits, engine, BITS_PER_WEIGHT.get(bits, bits))


@once
def _served(checkpoint: Checkpoint) -> Mapping[str, str]:
    return served_types((checkpoint.quantization_config or {}).get("types") or {})


def _is_norm(name: str) -> bool:
    return name.endswith(".bias") or "norm." in name


def _untested(target: Target) -> list[Finding]:
    """A warning on GPUs."""
    if target.device != "cpu":
        return [
            Finding.warning(
                "gguf-untested-gpu",
                "the kernels of GGUF layers have not run on a GPU; vllm-gguf-plugin serves these files on GPUs",
                [target.device],
                "compare a few answers with llama.cpp's before you rely on it",
            )
        ]
    return []


@hookimpl
def quantserve_converter() -> str:
    """A .gguf file to a checkpoint in bfloat16; needs torch and quantserve-quantize."""
    return "quantserve_gguf._convert:convert"
