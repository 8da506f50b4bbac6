"""The light module: what `quantserve list`, `check` and `plan` ask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from quantserve.api import Checkpoint, Expected, Finding, Linear, Method, Target, check_linears, hookimpl

if TYPE_CHECKING:
    from quantserve.api import ModelConfig


@hookimpl
def quantserve_method() -> Method:
    """Name the method; vLLM will know it by the same name, once ``register`` has run."""
    return Method(
        name="rtn8",
        summary="8-bit weights rounded to nearest, a scale per output channel",
        bits=(8,),
        vllm_name="rtn8",
        dtypes=("float16", "bfloat16", "float32"),
    )


@hookimpl
def quantserve_detect(checkpoint: Checkpoint) -> bool:
    """Claim what declares itself as ours."""
    return (checkpoint.quantization_config or {}).get("quant_method") == "rtn8"


@hookimpl
def quantserve_validate(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Iterable[Finding]:
    """Compare names, shapes and dtypes of all tensors. Whole rows and columns split over any number of ranks."""
    return check_linears(checkpoint, layout, code="rtn8")


@hookimpl
def quantserve_engine_kwargs(checkpoint: Checkpoint) -> Mapping[str, object]:
    """Keep vLLM from its float16 default where the checkpoint says nothing."""
    return {} if checkpoint.torch_dtype else {"dtype": "bfloat16"}


@hookimpl
def quantserve_quantizer() -> str:
    """Where the quantizer is; it may import torch."""
    return "quantserve_rtn8.quantize:quantize"


def layout(linear: Linear) -> Mapping[str, Expected]:
    """The tensors of one linear, by suffix."""
    return {"qweight": Expected((linear.n, linear.k), ("I8",)), "scale": Expected((linear.n,), ("F32",))}
