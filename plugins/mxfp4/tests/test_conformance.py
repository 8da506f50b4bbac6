"""The MXFP4 plugin passes the conformance kit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantserve.testing import Case, parametrize_with_checks


def reference(folder: Path) -> Mapping[str, Any]:
    """The experts that transformers makes of the files, [e, k, n] in float32."""
    import torch
    from safetensors.torch import load_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = load_file(folder / "model.safetensors")
    stacks = [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]
    return {
        name: convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32)
        for name in stacks
    }


CASE = Case(
    "mxfp4",
    checkpoint=Path(__file__).parent / "data" / "gpt-oss",
    reference=reference,
    harmless={"config modules_to_not_convert*": "vLLM quantizes the experts of gpt-oss whatever it says"},
)


@parametrize_with_checks(CASE)
def test_conformance(check: Callable[[], None]) -> None:
    check()
