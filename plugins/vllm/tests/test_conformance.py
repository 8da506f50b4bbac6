"""The vLLM plugin passes the conformance kit."""

from __future__ import annotations

from collections.abc import Callable

from quantserve.testing import Case, parametrize_with_checks

CASE = Case(
    "vllm",
    checkpoint={"quant_method": "experts_int8"},
    expected_failures={"V01-good": "INT8 experts need AMX on a CPU, and are not served on ROCm"},
)


@parametrize_with_checks(CASE)
def test_conformance(check: Callable[[], None]) -> None:
    check()
