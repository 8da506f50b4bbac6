"""The fp16 plugin passes the conformance kit."""

from __future__ import annotations

from collections.abc import Callable

from quantserve.testing import Case, parametrize_with_checks, write_llama

CASE = Case(
    "fp16",
    checkpoint=write_llama,
    reference=lambda folder: {},  # every weight is in the files as it is
    expected_failures={"E04-missing-tensors": "vLLM misses no part of a fused layer; V02 finds it before"},
)


@parametrize_with_checks(CASE)
def test_conformance(check: Callable[[], None]) -> None:
    check()
