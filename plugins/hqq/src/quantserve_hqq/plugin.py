"""The light module of the HQQ plugin: what `quantserve list`, `check` and `plan` ask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    check_mixed_layers,
    codebook_kernel,
    codebook_method,
    dtype_argument,
    hookimpl,
    kernel_findings,
)
from quantserve_hqq.format import BITS, entries, entry, settings, stored

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

ORIGINAL = "qmodel.pt"
"""A pickle of nested dicts, as hqq saved models before it wrote safetensors."""
_WHERE = "quantization_config"


@hookimpl
def quantserve_method() -> Method:
    """Describe HQQ as this plugin serves it."""
    summary = "2-, 3-, 4- and 8-bit HQQ (axis 1), widths by kind of linear"
    return codebook_method("hqq", summary, BITS, "https://github.com/dropbox/hqq")


@hookimpl
def quantserve_detect(checkpoint: Checkpoint) -> bool:
    """Claim what declares HQQ; where no method is declared, hqq's tensors and its first kind of file."""
    declared = _config(checkpoint).get("quant_method")
    if declared:
        return str(declared).lower() == "hqq"
    return ORIGINAL in checkpoint.files or any(name.endswith(".W_q") for name in checkpoint.tensors)


@hookimpl
def quantserve_scheme(checkpoint: Checkpoint, linear: Linear) -> Scheme | None:
    """By the kind of linear, as transformers' `dynamic_config` has it."""
    try:
        value = entry(_config(checkpoint), linear.name)
        return None if value is None else stored(settings(value))
    except ValueError:
        return None  # `quantserve_validate` gives the reason


@hookimpl
def quantserve_validate(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterator[Finding]:
    """What is peculiar to HQQ: settings that are not served, and fused layers whose parts differ."""
    config = _config(checkpoint)
    yield from kernel_findings("hqq", "HQQ", target, checkpoint, quantserve_scheme)
    if ORIGINAL in checkpoint.files and not any(name.endswith(".safetensors") for name in checkpoint.files):
        message = f"{ORIGINAL} is a pickle of nested dicts, which only hqq reads"
        fix = "load it with hqq (AutoHQQHFModel.from_quantized) and save it again with its save_to_safetensors"
        yield Finding.error("hqq-original-file", message, [ORIGINAL], fix)
        return
    quantized = [name for name in checkpoint.tensors if name.endswith(".W_q")]
    if checkpoint.tensors_complete and not quantized:
        yield Finding.error(
            "hqq-not-quantized",
            "HQQ is declared or asked for, and no linear has W_q: transformers would quantize while it loads, which is "
            "not done here",
            ["W_q"],
            "save the quantized model (model.save_pretrained), or remove quantization_config and serve it unquantized",
        )
        return
    if not config:
        return  # the core says that it is missing
    bad = []
    for where, value in entries(config).items():
        try:
            settings(value)
        except ValueError as error:
            bad.append(f"{_WHERE}.{where}: {error}")
    if bad:
        message = f"settings of HQQ that are not served. First: {bad[0]}"
        yield Finding.error("hqq-settings", message, bad, "quantize with axis 1, nbits 2, 3, 4 or 8, and plain scales")
        return

    def setting(linear: Linear) -> object:
        value = entry(config, linear.name)
        return None if value is None else settings(value)

    yield from check_mixed_layers(checkpoint, setting, code="hqq-mixed-layer")


@hookimpl
def quantserve_engine_kwargs(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Mapping[str, object]:
    """The dtype where a CPU prefers another than the files'."""
    return dtype_argument(checkpoint, model, target, CODEBOOK_DTYPES)


@hookimpl
def quantserve_quantizer() -> str:
    """Half-quadratic rounding; needs torch and quantserve-quantize."""
    return "quantserve_hqq.quantizer:Hqq"


@hookimpl
def quantserve_kernel(target: Target, bits: int, engine: str) -> KernelProfile | None:
    """With groups of 64, a float16 scale and zero each."""
    return codebook_kernel(target, bits, engine, bits + 0.5, benchmark="quantserve_hqq._benchmark:make")


def _config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    return checkpoint.quantization_config or {}
