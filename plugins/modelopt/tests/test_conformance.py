"""The ModelOpt plugin passes the conformance kit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantserve.testing import Case, parametrize_with_checks

DATA = Path(__file__).parent / "data" / "qwen3-moe"
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def reference(folder: Path) -> Mapping[str, Any]:
    """E2M1 values, two a byte, times the scales of their group of 16 and of the tensor, in float32."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    table = torch.tensor([*VALUES, *(-value for value in VALUES)])
    weights = {}
    for name in [name.removesuffix(".weight_scale_2") for name in tensors if name.endswith(".weight_scale_2")]:
        octets, scale = tensors[f"{name}.weight"].long(), tensors[f"{name}.weight_scale"].float()
        values = table[torch.stack((octets & 15, octets >> 4), dim=2).flatten(1)]
        weights[name] = values * (scale * tensors[f"{name}.weight_scale_2"]).repeat_interleave(16, 1)
    return weights


CASE = Case(
    "modelopt",
    checkpoint=DATA,
    reference=reference,
    harmless={
        "config config_groups*": "vLLM reads of it whether activations are quantized, and no more",
        "config kv_cache_scheme*": "a cache that vLLM does not know keeps 16 bits",
        "config producer*": "it tells who wrote the file",
        "tensor k_scale missing*": "vLLM takes 1.0, which an info says",
        "tensor v_scale missing*": "vLLM takes 1.0, which an info says",
        "model intermediate_size*": "no layer of this mixture is dense",
    },
)


@parametrize_with_checks(CASE)
def test_conformance(check: Callable[[], None]) -> None:
    check()
