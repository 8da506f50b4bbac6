"""The MXFP4 plugin passes the conformance kit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from quantserve.testing import Case, parametrize_with_checks

CASE = Case(
    "mxfp4",
    checkpoint=Path(__file__).parent / "data" / "gpt-oss",
    harmless={"config modules_to_not_convert*": "vLLM quantizes the experts of gpt-oss whatever it says"},
)


@parametrize_with_checks(CASE)
def test_conformance(check: Callable[[], None]) -> None:
    check()
