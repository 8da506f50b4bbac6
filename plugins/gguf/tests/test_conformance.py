"""The GGUF plugin passes the conformance kit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantserve.testing import Case, parametrize_with_checks


def reference(file: Path) -> Mapping[str, Any]:
    """All weights in float32; `test_weights` compares their logits with those of transformers' own reader."""
    import torch
    import transformers

    from quantserve_gguf._folder import folder_of
    from quantserve_gguf._weights import weights

    with tempfile.TemporaryDirectory() as cache:
        config = transformers.AutoConfig.from_pretrained(folder_of(str(file), None, Path(cache)))
    with file.open("rb") as opened:
        return {name.removesuffix(".weight"): one for name, one in weights(opened, config, {}, torch.float32)}


CASE = Case(
    "gguf",
    checkpoint=Path(__file__).parent / "data" / "llama.gguf",
    reference=reference,
    harmless={"all linears plain": "a file of plain floats is served as it is"},
)


@parametrize_with_checks(CASE)
def test_conformance(check: Callable[[], None]) -> None:
    check()
