"""Checks, and running them: one outcome each, with what to do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from quantserve.errors import PluginError, UsageError, unknown_name
from quantserve.testing.case import Case
from quantserve.testing.subject import Subject
from quantserve.text import harmless

Outcome = Literal["passed", "failed", "expected", "skipped"]
Test = Callable[[Subject], Iterable[str]]
MOST_PROBLEMS: Final = 12
"""Problems of one check that are shown."""
GROUPS: Final = {
    "S": "seam",
    "D": "detection",
    "V": "validation",
    "P": "tensor parallelism",
    "N": "numerics",
    "I": "isolation",
    "R": "predictions",
    "T": "text",
    "Q": "tools",
    "E": "engine",
}
"""The groups of checks by the letter of their ids."""


class Skip(Exception):
    """The check cannot be made here; the message says why."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        id: ``V04-wrong-dtype``; it stays what it is from version to version.
        run: gives what is wrong, one line each; nothing where all is well.
        needs: what a plugin must have for the check to apply: capabilities, hooks, files.
    """

    id: str
    run: Test
    needs: frozenset[str]

    @property
    def group(self) -> str:
        """``validation``."""
        return GROUPS[self.id[0]]

    @property
    def opt_in(self) -> bool:
        """Whether it starts an engine, and runs only when asked for."""
        return self.id.startswith("E")

    @property
    def text(self) -> str:
        """What it checks."""
        return inspect.cleandoc(self.run.__doc__ or "").partition("\n\nFix: ")[0]

    @property
    def fix(self) -> str:
        """What to do when it fails."""
        return " ".join(inspect.cleandoc(self.run.__doc__ or "").partition("\n\nFix: ")[2].split())


CHECKS: dict[str, Check] = {}
"""All checks by id."""


def check(id: str, *needs: str) -> Callable[[Test], Test]:
    """Register a function as a check. Its docstring is the documentation and ends with a paragraph ``Fix: ...``."""

    def register(function: Test) -> Test:
        CHECKS[id] = Check(id, function, frozenset(needs))
        return function

    return register


@dataclass(frozen=True)
class Result:
    """What became of one check; `problems` says why it failed or was skipped."""

    check: Check
    outcome: Outcome
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return {
            "id": self.check.id,
            "group": self.check.group,
            "outcome": self.outcome,
            "problems": list(self.problems),
            "fix": self.check.fix if self.outcome == "failed" else "",
        }


def applicable(subject: Subject, *, engine: bool = False, only: Collection[str] = ()) -> list[Check]:
    """The checks that apply to a plugin, in the order of their ids.

    Args:
        subject: the plugin.
        engine: whether those that start an engine are wanted.
        only: beginnings of ids; none for all.

    Raises:
        UsageError: an expected failure or an entry of `only` is the id of no check.
    """
    for id in subject.case.expected_failures:
        if id not in CHECKS:
            raise UsageError(f"expected_failures: {unknown_name('check', id, CHECKS)}")
    for start in only:
        if not any(id.startswith(start) for id in CHECKS):
            raise UsageError(unknown_name("check", start, CHECKS))
    return [
        one
        for one in CHECKS.values()
        if one.needs <= subject.facts | {"loaded"}
        and (engine or not one.opt_in)
        and (not only or one.id.startswith(tuple(only)))
    ]


def problems_of(subject: Subject, one: Check) -> list[str]:
    """What a check finds wrong, shortened.

    Raises:
        Skip: it cannot be made.
    """
    if "loaded" in one.needs and subject.plugin is None:
        raise Skip("the plugin does not load")
    found: list[str] = []
    try:
        for problem in one.run(subject):
            found.append(harmless(problem))
    except PluginError as error:
        found.append(error.reason if error.stage == "" else f"{error.stage}: {error.reason}")
    if len(found) > MOST_PROBLEMS:
        found[MOST_PROBLEMS:] = [f"and {len(found) - MOST_PROBLEMS} more"]
    return found


def result_of(subject: Subject, one: Check) -> Result:
    """Run one check. An expected failure that passes counts as failed."""
    try:
        problems = tuple(problems_of(subject, one))
    except Skip as skip:
        return Result(one, "skipped", (str(skip),))
    reason = subject.case.expected_failures.get(one.id)
    if reason is None:
        return Result(one, "failed" if problems else "passed", problems)
    if problems:
        return Result(one, "expected", (reason, *problems))
    return Result(one, "failed", (f"it passes, and the case expects it to fail: {reason}",))


def results(case: Case, *, engine: bool = False, only: Collection[str] = (), first: bool = False) -> Iterator[Result]:
    """Run the checks that apply to a plugin.

    Args:
        case: the plugin.
        engine: whether to run those that start an engine.
        only: beginnings of ids; none for all.
        first: whether to end at the first failure.
    """
    subject = Subject(case)
    for one in applicable(subject, engine=engine, only=only):
        result = result_of(subject, one)
        yield result
        if first and result.outcome == "failed":
            return
