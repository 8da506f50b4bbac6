"""Commands of other distributions, through the entry-point group ``quantserve.commands``.

An entry point ``NAME = "module:command"`` names a click command. `find` reads the entry points and imports nothing;
`Command.load` imports one command. A defect stays with its command: a row in ``quantserve list``, and an error when
that command is run.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, EntryPoints
from typing import Final

import click

from quantserve.errors import PluginError, QuantserveError, UsageError
from quantserve.plugins import foreign
from quantserve.plugins.entry_points import (
    duplicate,
    installed,
    left_out,
    named_for,
    names_in,
    origin,
    package_of,
    resolve,
    unique,
    unmet_requirement,
    unusable_name,
)
from quantserve.text import harmless

GROUP: Final = "quantserve.commands"


@dataclass(frozen=True)
class Command:
    """A command of another distribution.

    Attributes:
        name: of the entry point; what a user types.
        distribution, version: where it was installed from.
        point: the entry point.
        ours: whether it is one of this project's, so that its defects are bugs of quantserve.
        refusal: why it cannot be used, whatever its module holds.
    """

    name: str
    distribution: str
    version: str
    point: EntryPoint
    ours: bool = False
    refusal: QuantserveError | None = None

    @property
    def origin(self) -> str:
        """``quantserve-hello 1.0``, harmless for a terminal."""
        return harmless(f"{self.distribution} {self.version}", 100)

    def load(self) -> click.Command:
        """Import the command.

        Raises:
            PluginError: it is defective, or its name belongs to another distribution.
            UsageError: it is switched off.
        """
        if self.refusal:
            raise self.refusal
        if unmet := unmet_requirement(self.point):
            raise self.defect("requires", *unmet)
        what = f"command {self.name} ({self.origin})"
        if os.environ.get("QUANTSERVE_DEBUG"):
            foreign.say(f"importing {what}")
        try:
            return foreign.run(
                self._resolve, what, foreign.hook_seconds() * foreign.IMPORT_PARTS, f"loading {what} ..."
            )
        except foreign.Raised as raised:
            raise self.blame(raised.error, "load") from raised.error

    def blame(self, error: BaseException, stage: str = "run") -> PluginError:
        """The error that blames this command for an exception of its code."""
        return self.defect(stage, foreign.reason(error, package_of(self.point)))

    def defect(self, stage: str, reason: str, fix: str = "") -> PluginError:
        """The error that blames this command."""
        return PluginError(self.name, self.distribution, self.version, stage, reason, fix, kind="command")

    def _resolve(self) -> click.Command:
        found = resolve(self.point)
        if not isinstance(found, click.Command):
            raise foreign.Breach(f"{self.point.value!r:.80} is a {type(found).__name__}, not a click command")
        return found


def find(
    builtin: Collection[str],
    extras: Mapping[str, tuple[str, str]],
    environ: Mapping[str, str] = os.environ,
    points: EntryPoints | None = None,
) -> list[Command]:
    """The commands of other distributions, by name, also those that cannot be used.

    A name in `builtin` is quantserve's, one in `extras` that of the distribution ``quantserve-EXTRA``. For other names
    see `entry_points.duplicate`.

    Args:
        builtin: names of the commands of quantserve itself.
        extras: commands that other distributions of this project have: name -> (extra, what it does).
        environ: for ``QUANTSERVE_DISABLE``, with names of commands or distributions.
        points: default: what is installed.
    """
    points = installed((GROUP,))[0] if points is None else points
    denied = names_in(environ.get("QUANTSERVE_DISABLE")) or frozenset()
    found = sorted(unique(points.select(group=GROUP)), key=lambda point: (point.name, origin(point)))
    commands = []
    for point in found:
        distribution, version = origin(point)
        ours = point.name in extras and named_for(distribution, extras[point.name][0])
        command = Command(point.name, distribution, version, point, ours)
        commands.append(replace(command, refusal=_refusal(command, builtin, extras, denied)))
    owners = defaultdict(list)
    for command in commands:
        if not command.refusal:
            owners[command.name].append((command.distribution, command.version))
    return [_without_rivals(command, owners[command.name]) for command in commands]


def _refusal(
    command: Command, builtin: Collection[str], extras: Mapping[str, tuple[str, str]], denied: frozenset[str]
) -> QuantserveError | None:
    name = command.name
    if off := left_out(command.point, None, denied):
        return UsageError(
            f"command {name!r} of {command.origin} is switched off: {off}\n  fix: remove it from QUANTSERVE_DISABLE"
        )
    if name in builtin:
        return command.defect("names", f"{name!r} is a command of quantserve itself")
    if name in extras and not command.ours:
        return command.defect("names", f"{name!r} is the command of quantserve-{extras[name][0]}")
    if reason := unusable_name(name):
        return command.defect("names", reason)
    return None


def _without_rivals(command: Command, owners: Sequence[tuple[str, str]]) -> Command:
    clash = None if command.refusal else duplicate(command.name, owners, command.distribution)
    return replace(command, refusal=command.defect("duplicate", *clash)) if clash else command
