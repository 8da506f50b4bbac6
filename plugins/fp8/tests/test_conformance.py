"""The FP8 plugin passes the conformance kit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantserve.testing import Case, parametrize_with_checks

DATA = Path(__file__).parent / "data" / "qwen3-moe-fp8"


def reference(folder: Path) -> Mapping[str, Any]:
    """E4M3 values times the scale of their block of 128 x 128, in float32."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    scales = {name: one for name, one in tensors.items() if name.endswith("_scale_inv")}
    weights = {}
    for name, scale in scales.items():
        codes = tensors[name.removesuffix("_scale_inv")]
        rows, columns = codes.shape
        every = scale.float().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        weights[name.removesuffix(".weight_scale_inv")] = codes.float() * every
    return weights


CASE = Case(
    "fp8",
    checkpoint=DATA,
    reference=reference,
    harmless={
        "model intermediate_size*": "no layer of this mixture is dense",
        "config modules_to_not_convert removed": "vLLM takes no router for quantized, and lm_head never",
        "config dequantize *": "it tells transformers what to do after loading",
        "config scale_fmt *": "vLLM does not read it",
    },
)


@parametrize_with_checks(CASE)
def test_conformance(check: Callable[[], None]) -> None:
    check()
