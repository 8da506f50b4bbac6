"""The light module: what `quantserve list`, `check` and `plan` ask."""

from __future__ import annotations

from collections.abc import Mapping

from quantserve.api import Checkpoint, Linear, Method, Scheme, hookimpl
from quantserve_rtn8.format import SCHEME


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
def quantserve_scheme(checkpoint: Checkpoint, linear: Linear) -> Scheme:
    """The same for every linear. Names, shapes and dtypes of the files are compared with it."""
    return SCHEME


@hookimpl
def quantserve_engine_kwargs(checkpoint: Checkpoint) -> Mapping[str, object]:
    """Keep vLLM from its float16 default where the checkpoint says nothing."""
    return {} if checkpoint.torch_dtype else {"dtype": "bfloat16"}


@hookimpl
def quantserve_quantizer() -> str:
    """Where the quantizer is; it may import torch."""
    return "quantserve_rtn8.quantize:quantize"
