"""The checks as tests of pytest."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from quantserve.testing.case import Case
from quantserve.testing.check import Check, Skip, applicable, problems_of
from quantserve.testing.subject import Subject

ENGINE: Final = "QUANTSERVE_TEST_ENGINE"
"""The variable that runs the checks which start an engine."""


@dataclass(frozen=True)
class _Test:
    """One check of one plugin; calling it raises AssertionError with what is wrong and what to do."""

    subject: Subject
    check: Check

    def __call__(self) -> None:
        import pytest

        try:
            problems = problems_of(self.subject, self.check)
        except Skip as skip:
            pytest.skip(str(skip))
        lines = [f"{self.check.id}: {len(problems)} problems", *problems, f"fix: {self.check.fix}"]
        assert not problems, "\n  ".join(lines)


def parametrize_with_checks(*cases: Case | str) -> Callable[[Any], Any]:
    """A decorator that runs a test once for each check, as its argument ``check``, which the test has to call.

    Args:
        cases: the plugins; a name alone is ``Case(name)``.

    Raises:
        UsageError: a plugin is not installed, or a case is wrong.
    """
    import pytest

    params = []
    for case in cases:
        subject = Subject(Case(case) if isinstance(case, str) else case)
        for one in applicable(subject, engine=bool(os.environ.get(ENGINE))):
            reason = subject.case.expected_failures.get(one.id)
            marks = [pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)] if reason else []
            params.append(pytest.param(_Test(subject, one), id=f"{subject.case.name}-{one.id}", marks=marks))
    return pytest.mark.parametrize("check", params)
