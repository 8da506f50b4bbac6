"""The GPTQ plugin passes the conformance kit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantserve.testing import Case, parametrize_with_checks

DATA = Path(__file__).parent / "data"


def reference(folder: Path) -> Mapping[str, Any]:
    """(code - zero) * scale, codes along K from the lowest bits of a word, zeros along N and one less than they are."""
    import torch
    from safetensors.torch import load_file

    def codes(words: torch.Tensor) -> torch.Tensor:
        return torch.stack([(words.long() >> (4 * place)) & 15 for place in range(8)], dim=1).flatten(0, 1)

    tensors, weights = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        scales, zeros = tensors[f"{module}.scales"].float(), codes(tensors[f"{module}.qzeros"].t()).t() + 1
        group = (codes(tensors[name]).shape[0]) // scales.shape[0]
        zeros, scales = zeros.repeat_interleave(group, 0), scales.repeat_interleave(group, 0)
        weights[module] = ((codes(tensors[name]) - zeros).float() * scales).t()
    return weights


CASE = Case(
    "gptq",
    checkpoint=DATA / "autoround-w4g32-sym",
    reference=reference,
    harmless={
        "tensor g_idx missing": "without act-order the order of groups is known",
        "config autoround_version *": "nobody reads it",
        "config provider *": "nobody reads it",
        "config damp_percent *": "how the weights were found",
        "config enable_quanted_input *": "how the weights were found",
        "config true_sequential *": "how the weights were found",
        "config data_type *": "AutoRound's own; GPTQ has integers only",
        "config desc_act wrong value": "g_idx in the files tells the order of groups",
        "config sym wrong value": "the zeros of symmetric files are stored as well",
        "config lm_head removed": "false is the default",
    },
)


@parametrize_with_checks(CASE)
def test_conformance(check: Callable[[], None]) -> None:
    check()
