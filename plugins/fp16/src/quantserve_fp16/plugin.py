"""The fp16 plugin: unquantized checkpoints, served as they are. Also the tutorial: read it top to bottom.

A plugin is a module with hooks. This one is named by the entry point ``fp16`` of the group
``quantserve.plugins`` in pyproject.toml, and imports nothing but ``quantserve.api`` and itself: no
torch, no vLLM, because hooks run in ``quantserve list`` and ``check`` as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from quantserve.api import (
    Checkpoint,
    Finding,
    K,
    KernelProfile,
    Linear,
    Method,
    N,
    Part,
    PerformanceProfile,
    Scheme,
    Target,
    dtype_argument,
    hookimpl,
    method_dtype,
    once,
    rayllm_profile,
)
from quantserve_fp16 import speed
from quantserve_fp16.reference import CAVEAT, RUNS

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

# Every linear is one plain weight [n, k], n = out_features, k = in_features.
PLAIN = Scheme({"weight": Part((N(), K()), ("F16", "BF16", "F32"))}, bits=16, scales="none")
DTYPES = ("float16", "bfloat16", "float32")
PACKED = ("U8", "I8", "I16", "U16", "I32", "U32")
QUANTIZED = (
    "qweight", "qzeros", "lookup_table", "weight_packed", "weight_scale", "weight_scale_inv", "W_q", "q_weight",
    "trellis", "codebooks", "Qidxs", "col_vals", "weight_scale_2", "gate_up_proj_blocks", "blocks",
)  # fmt: skip


@hookimpl
def quantserve_method() -> Method:
    """Say who we are. ``vllm_name`` None: vLLM needs no ``quantization`` argument for these."""
    return Method(
        name="fp16",
        summary="unquantized float16, bfloat16 and float32 checkpoints",
        bits=(16,),
        vllm_name=None,
        aliases=("none", "unquantized"),
        devices=("cuda", "rocm", "cpu"),
        dtypes=DTYPES,
        homepage="https://docs.vllm.ai",
    )


@hookimpl
def quantserve_detect(checkpoint: Checkpoint) -> bool:
    """Claim a checkpoint whose config names no method and whose files hold plain weights only."""
    return checkpoint.quantization_config is None and bool(checkpoint.tensors) and not quantized_tensors(checkpoint)


@hookimpl
def quantserve_scheme(checkpoint: Checkpoint, linear: Linear) -> Scheme | None:
    """Say how a linear is stored; the core compares names, shapes and dtypes of the files with it."""
    return None if quantized_tensors(checkpoint) else PLAIN


@hookimpl
def quantserve_validate(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterable[Finding]:
    """Find what else would make vLLM refuse the model or serve it wrong. Core has checked all that is not ours."""
    if leftover := quantized_tensors(checkpoint):
        return [
            Finding.error(
                "fp16-quantized-tensors",
                f"{len(leftover)} quantized tensors in a model that is to be served unquantized: vLLM would fail at "
                f"the first of them. First: {leftover[0]}",
                leftover[:8],
                "name the method in engine_kwargs.quantization, or add its quantization_config to config.json",
            )
        ]
    if method_dtype(checkpoint, model, target, DTYPES) == "bfloat16":
        return [
            Finding.info(
                "fp16-dtype",
                "the weights are float16, which this CPU only emulates; they will be served in bfloat16, which it has",
                ["engine_kwargs.dtype"],
                "set engine_kwargs.dtype to float16 to keep all bits, several times slower in batches and prompts",
            )
        ]
    return []


@hookimpl
def quantserve_engine_kwargs(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Mapping[str, object]:
    """Give the vLLM arguments this model needs; what the config itself sets wins over them."""
    return dtype_argument(checkpoint, model, target, DTYPES)


@hookimpl
def quantserve_performance(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> PerformanceProfile | None:
    """Give what somebody measured of exactly this; None where nobody did."""
    return rayllm_profile(RUNS, checkpoint, model, target, caveat=CAVEAT)


@hookimpl
def quantserve_kernel(target: Target, bits: int, engine: str) -> KernelProfile | None:
    """Say what the kernel reaches, so that the core can predict the rest."""
    return speed.kernel(target, bits, engine)


# --- our own rules ------------------------------------------------------------------------------------


@once
def quantized_tensors(checkpoint: Checkpoint) -> list[str]:
    """Names of tensors that only quantized checkpoints have."""
    return sorted(
        name
        for name, tensor in checkpoint.tensors.items()
        if name.rpartition(".")[2] in QUANTIZED
        or (name.endswith(".weight") and len(tensor.shape) == 2 and tensor.dtype in PACKED)
    )
