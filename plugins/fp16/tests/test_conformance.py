"""The fp16 plugin passes the conformance kit."""

from __future__ import annotations

from collections.abc import Callable

from quantserve.testing import Case, parametrize_with_checks, write_llama

CASE = Case("fp16", checkpoint=write_llama, reference=lambda folder: {})


@parametrize_with_checks(CASE)
def test_conformance(check: Callable[[], None]) -> None:
    check()
