"""The conformance kit: whether a plugin keeps to what quantserve and its users rely on.

    CASE = Case("mymethod", checkpoint=Path(__file__).parent / "data" / "tiny")

    @parametrize_with_checks(CASE)
    def test_conformance(check):
        check()

or, without pytest, ``quantserve plugin check mymethod``. Every check has an id that stays (`CHECKS`), says what to do,
and applies to plugins that are capable of what it checks. docs/conformance.md lists them. The kit has the version of
the API (`quantserve.api.VERSION`).
"""

from quantserve.testing import checks as _checks  # registers them
from quantserve.testing.case import CAPABILITIES, Case
from quantserve.testing.check import CHECKS, Check, Result
from quantserve.testing.parametrize import parametrize_with_checks
from quantserve.testing.report import Report, run_checks
from quantserve.testing.samples import SAMPLES, Sample
from quantserve.testing.tiny import write_llama

__all__ = [
    "CAPABILITIES",
    "CHECKS",
    "SAMPLES",
    "Case",
    "Check",
    "Report",
    "Result",
    "Sample",
    "parametrize_with_checks",
    "run_checks",
    "write_llama",
]

assert _checks.__all__
