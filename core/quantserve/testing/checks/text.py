"""What people read of a plugin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from quantserve.errors import PluginError
from quantserve.finding import Finding
from quantserve.testing.check import check
from quantserve.testing.checks.validation import all_damages
from quantserve.testing.child import ask
from quantserve.testing.subject import Subject
from quantserve.text import escaped

LONGEST_MESSAGE: Final = 600
"""Characters of a message or of a fix."""
_SILENT: Final = """
import importlib, os
import quantserve.api
from quantserve.plugins.plugin import load
from importlib.metadata import entry_points
point = next(p for p in entry_points(group="quantserve.plugins") if p.name == sys.argv[1])
loaded = load(point, False, 0)
answer(0)
"""


@check("T01-method", "method")
def method_texts(subject: Subject) -> Iterator[str]:
    """The summary is one short line without a full stop, and the homepage, if there is one, an address.

    Fix: describe the method as in `quantserve list`: at most 100 characters.
    """
    method = subject.method
    assert method is not None
    if len(method.summary) > 100 or method.summary.endswith("."):
        yield f"summary: {method.summary!r}"
    if method.homepage and not method.homepage.startswith(("https://", "http://")):
        yield f"homepage: {method.homepage!r}"


@check("T02-findings", "loaded")
def findings(subject: Subject) -> Iterator[str]:
    """Findings hold no control characters and no escape codes, and at most 600 characters in a message or a fix.

    Fix: quote names with `!r`, show the first of many, and list the others as offenders.
    """
    seen: set[tuple[str, str]] = set()
    for finding in _every_finding(subject):
        if finding.source not in (subject.case.name, *(subject.method.names if subject.method else ())):
            continue
        for what, text in (
            ("message", finding.message),
            ("fix", finding.fix),
            *(("offender", o) for o in finding.offenders),
        ):
            wrong = "escape codes" if "\\x1b" in text or escaped(text) != text else ""
            wrong = wrong or (f"{len(text)} characters" if len(text) > LONGEST_MESSAGE else "")
            if wrong and (finding.code, wrong) not in seen:
                seen.add((finding.code, wrong))
                yield f"{finding.code}: its {what} has {wrong}: {text[:80]!r}"


def _every_finding(subject: Subject) -> Iterator[Finding]:
    damaged = [damage.checkpoint for damage in all_damages(subject)][::5] if subject.method else []
    for checkpoint in [subject.good, *damaged]:
        for target in subject.targets[:1] if checkpoint is not subject.good else subject.targets:
            try:
                yield from subject.composed(checkpoint, target).findings
            except PluginError:
                continue  # other checks say it


@check("T03-silent", "loaded")
def silent(subject: Subject) -> Iterator[str]:
    """Importing the light module and asking for its method prints nothing.

    Fix: remove the print; `logging` is silent by default.
    """
    answer = ask(_SILENT, subject.case.name)
    if answer.problem:
        yield answer.problem
    elif answer.printed:
        yield f"it prints: {answer.printed[:300]}"
