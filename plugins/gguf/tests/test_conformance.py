"""The GGUF plugin passes the conformance kit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from quantserve.testing import Case, parametrize_with_checks

CASE = Case(
    "gguf",
    checkpoint=Path(__file__).parent / "data" / "llama.gguf",
    harmless={"all linears plain": "a file of plain floats is served as it is"},
)


@parametrize_with_checks(CASE)
def test_conformance(check: Callable[[], None]) -> None:
    check()
