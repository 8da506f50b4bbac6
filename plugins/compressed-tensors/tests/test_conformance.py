"""The compressed-tensors plugin passes the conformance kit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantserve.testing import Case, parametrize_with_checks

DATA = Path(__file__).parent / "data"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def reference(folder: Path) -> Mapping[str, Any]:
    """E2M1 values, the first of two in the low half of a byte, times E4M3 scales over the global scale."""
    import torch
    from safetensors.torch import load_file

    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    tensors, weights = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        module, octets = name.removesuffix(".weight_packed"), tensors[name].long()
        values = table[torch.stack((octets & 15, octets >> 4), -1).flatten(1)]
        scales = tensors[f"{module}.weight_scale"].float() / tensors[f"{module}.weight_global_scale"]
        weights[module] = values * scales.repeat_interleave(16, 1)
    return weights


CASE = Case(
    "compressed-tensors",
    checkpoint=DATA / "nvfp4",
    reference=reference,
    harmless={
        "config *format *": "vLLM tells NVFP4 by the settings of the weights",
        "config *dynamic removed": "false is the default",
        "config *dynamic wrong value": "vLLM does not look at it for NVFP4 weights",
        "config *symmetric removed": "true is the default",
        "config *scale_dtype *": "the tensors tell the dtype",
        "config *observer *": "how the scales were found",
        "config ignore removed": "vLLM's class of lm_head is no Linear",
        "config quantization_status *": "vLLM does not read it",
        "config version *": "vLLM does not read it",
    },
)


@parametrize_with_checks(CASE)
def test_conformance(check: Callable[[], None]) -> None:
    check()
