"""Commands of other distributions, through the entry-point group ``quantserve.commands``.

An entry point ``NAME = "module:command"`` names a click command. `find` reads the entry points and imports nothing;
`Command.load` imports one command. A defect stays with its command: a row in ``quantserve list``, and an error when
that command is run.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoints
from typing import ClassVar, Final

import click

from quantserve.errors import QuantserveError
from quantserve.plugins.entry_points import installed, named_for, names_in, origin, unique, unusable_name
from quantserve.plugins.extension import Extension, switched_off, without_rivals

GROUP: Final = "quantserve.commands"


@dataclass(frozen=True)
class Command(Extension):
    """A command of another distribution; its name is what a user types."""

    kind: ClassVar[str] = "command"

    def load(self, seconds: float | None = None) -> click.Command:
        """Import the command; raises as `Extension.load`."""
        command: click.Command = super().load(seconds)
        return command

    def problem(self, found: object) -> str:
        """Why it is no command."""
        return "" if isinstance(found, click.Command) else f"is a {type(found).__name__}, not a click command"


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
        command = Command.of(point)
        ours = point.name in extras and named_for(command.distribution, extras[point.name][0])
        command = replace(command, ours=ours)
        commands.append(replace(command, refusal=_refusal(command, builtin, extras, denied)))
    return without_rivals(commands)


def _refusal(
    command: Command, builtin: Collection[str], extras: Mapping[str, tuple[str, str]], denied: frozenset[str]
) -> QuantserveError | None:
    name = command.name
    if off := switched_off(command, denied):
        return off
    if name in builtin:
        return command.defect("names", f"{name!r} is a command of quantserve itself")
    if name in extras and not command.ours:
        return command.defect("names", f"{name!r} is the command of quantserve-{extras[name][0]}")
    if reason := unusable_name(name):
        return command.defect("names", reason)
    return None
