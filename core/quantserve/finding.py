"""Findings: what a check says about a model before it is served."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from quantserve.text import LONGEST, harmless

LONGEST_NAME: Final = 500
"""Characters of an offender, a code or a source."""


class Severity(StrEnum):
    """How bad a finding is. ``ERROR`` refuses the model; the others only inform."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of a check. Its texts come from files and plugins, and are made harmless here.

    Attributes:
        severity: ``ERROR`` when vLLM would refuse the model or serve it with wrong tokens.
        code: stable kebab-case name, for scripts and for docs/findings.md.
        message: what is wrong, with the numbers.
        offenders: tensors, files or config keys, the first few when there are many.
        fix: what to do about it.
        source: ``core`` or the plugin that said so; filled in by the host.
    """

    severity: Severity
    code: str
    message: str
    offenders: tuple[str, ...] = ()
    fix: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        """Escape and shorten every text; what a plugin gives in another type is left for the contract to name."""
        for name, longest in (("message", LONGEST), ("fix", LONGEST), ("code", LONGEST_NAME), ("source", LONGEST_NAME)):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, harmless(value, longest))
        if isinstance(self.offenders, tuple):
            made = (harmless(name, LONGEST_NAME) if isinstance(name, str) else name for name in self.offenders)
            object.__setattr__(self, "offenders", tuple(made))

    @classmethod
    def error(cls, code: str, message: str, offenders: Iterable[str] = (), fix: str = "") -> Finding:
        """A finding that refuses the model."""
        return cls(Severity.ERROR, code, message, _names(offenders), fix)

    @classmethod
    def warning(cls, code: str, message: str, offenders: Iterable[str] = (), fix: str = "") -> Finding:
        """A finding the operator should act on, though the model can be served."""
        return cls(Severity.WARNING, code, message, _names(offenders), fix)

    @classmethod
    def info(cls, code: str, message: str, offenders: Iterable[str] = (), fix: str = "") -> Finding:
        """A fact worth knowing."""
        return cls(Severity.INFO, code, message, _names(offenders), fix)

    def said_by(self, source: str) -> Finding:
        """The same finding with ``source`` filled in."""
        return replace(self, source=source)

    def to_json(self) -> dict[str, object]:
        """Plain data for ``--json``."""
        return {
            "severity": self.severity.value,
            "code": self.code,
            "message": self.message,
            "offenders": list(self.offenders),
            "fix": self.fix,
            "source": self.source,
        }


def _names(offenders: Iterable[str]) -> tuple[str, ...]:
    return (offenders,) if isinstance(offenders, str) else tuple(offenders)
