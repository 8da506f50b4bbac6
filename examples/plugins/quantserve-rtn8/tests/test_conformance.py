"""rtn8 passes quantserve's conformance kit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantserve.testing import Case, parametrize_with_checks, write_llama


def written(folder: Path) -> None:
    """A small Llama, rounded by the plugin's quantizer."""
    from quantserve_rtn8.quantize import quantize

    folder.rmdir()
    quantize(write_llama(folder.with_name("plain")), folder)


def reference(folder: Path) -> Mapping[str, Any]:
    """The stored integers times the scale of their output channel."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    return {one: tensors[f"{one}.qweight"].float() * tensors[f"{one}.scale"][:, None] for one in modules}


CASE = Case(
    "rtn8",
    checkpoint=written,
    reference=reference,
    harmless={"all linears plain": "a linear whose weight the files hold is served as it is"},
)


@parametrize_with_checks(CASE)
def test_conformance(check: Callable[[], None]) -> None:
    check()
