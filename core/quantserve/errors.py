"""What can go wrong, and whose fault it is.

    QuantserveError
    +-- UserError            exit 2   a command line, config file or path to correct
    |   +-- UsageError
    |   +-- ConfigError               names file:line
    |   +-- CheckpointError           not found, no access, unreadable as a whole
    +-- FindingsError        exit 1   a model was read and must not be served
    +-- PluginError          exit 3   a plugin's defect, for its author to correct
    +-- EngineError          exit 4   the engine or Ray failed at run time

``str(error)`` is the whole message for a person: what is wrong, where, the numbers, the fix.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

from quantserve.text import LONGEST_ERROR, harmless

if TYPE_CHECKING:
    from quantserve.finding import Finding


class QuantserveError(Exception):
    """Base of every error that quantserve raises on purpose."""

    exit_code = 2

    def __str__(self) -> str:
        """The message, in several lines, harmless for a terminal whatever names it quotes."""
        return harmless(super().__str__(), LONGEST_ERROR, keep="\n")


class UserError(QuantserveError):
    """The user's mistake: something they wrote has to change."""


class UsageError(UserError):
    """A wrong option, name or combination on the command line."""


class ConfigError(UserError):
    """A config file that cannot be used; the message begins with ``file:line``."""


class CheckpointError(UserError):
    """A checkpoint that cannot be found, reached or read at all."""


class FindingsError(QuantserveError):
    """At least one model has findings of severity error.

    Attributes:
        findings: the errors, by model id.
    """

    exit_code = 1

    def __init__(self, message: str, findings: dict[str, list[Finding]]) -> None:
        super().__init__(message)
        self.findings = findings


class PluginError(QuantserveError):
    """A defect of a plugin or of another distribution's command, with what its author needs to find it.

    All texts are made harmless.

    Attributes:
        plugin: entry-point name.
        distribution, version: what was installed.
        stage: where it failed: a stage of loading (`quantserve.plugins.plugin.Failure`), ``register`` or the name of a
            hook.
        reason: one line.
        fix: what to do; by default to upgrade, uninstall or disable the plugin.
    """

    exit_code = 3

    def __init__(
        self,
        plugin: str,
        distribution: str,
        version: str,
        stage: str,
        reason: str,
        fix: str = "",
        kind: str = "plugin",
    ) -> None:
        plugin, distribution, version, stage = (harmless(text, 200) for text in (plugin, distribution, version, stage))
        reason = harmless(reason)
        fix = harmless(fix) or f"upgrade or uninstall {distribution}, or leave it out with QUANTSERVE_DISABLE={plugin}"
        super().__init__(
            f"{kind} {plugin!r} of {distribution} {version} failed at stage {stage!r}: {reason}\n  fix: {fix}"
        )
        self.plugin = plugin
        self.distribution = distribution
        self.version = version
        self.stage = stage
        self.reason = reason
        self.fix = fix


class EngineError(QuantserveError):
    """The serving side failed while it ran: Ray, the engine or a port."""

    exit_code = 4


def one_line(error: BaseException) -> str:
    """The type and first line of an exception, for a table cell or a log line."""
    text = str(error).strip().splitlines()
    return harmless(f"{type(error).__name__}: {text[0]}" if text else type(error).__name__)


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Say that ``name`` is not a known ``what``, name the closest one and list them all."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name!r}{hint} (known: {', '.join(names) or 'none'})"
