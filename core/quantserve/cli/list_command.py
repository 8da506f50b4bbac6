"""``quantserve list``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from textwrap import fill

import click
from rich.markup import escape

from quantserve.cli import main
from quantserve.cli.output import console, print_json, table
from quantserve.errors import PluginError, UsageError
from quantserve.method import Method
from quantserve.plugins.commands import Command, find
from quantserve.plugins.registry import Registry

DEVICES_WIDTH = 12  # leaves room for the longest words of the rest on 80 columns


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Show the installed quantization methods, commands of other distributions, and what failed.

    A broken plugin is a row, not a crash; QUANTSERVE_DISABLE=a,b and QUANTSERVE_PLUGINS=a choose what is loaded.
    """
    registry = Registry.load()
    commands = [Row.of(command) for command in find(main.COMMANDS, main.EXTRAS, points=registry.points)]
    if as_json:
        print_json({**_as_json(registry), "commands": [asdict(row) for row in commands]})
    else:
        _print(registry, commands)


@dataclass(frozen=True)
class Row:
    """A command of another distribution; `state` is ``ok``, ``failed`` or ``disabled``."""

    name: str
    distribution: str
    version: str
    state: str = "ok"
    reason: str = ""
    fix: str = ""

    @classmethod
    def of(cls, command: Command) -> Row:
        """What importing the command gives."""
        row = cls(command.name, command.distribution, command.version)
        try:
            command.load()
        except PluginError as error:
            return replace(row, state="failed", reason=error.reason, fix=error.fix)
        except UsageError:
            return replace(row, state="disabled", reason="named in QUANTSERVE_DISABLE")
        return row

    def text(self) -> str:
        """The state with reason and fix, as markup."""
        colour = {"ok": "green", "failed": "red"}.get(self.state, "dim")
        lines = [f"[{colour}]{self.state}[/]{f': {escape(self.reason)}' if self.reason else ''}"]
        return "\n".join([*lines, *([f"[green]fix[/] {escape(self.fix)}"] if self.fix else [])])


def _print(registry: Registry, commands: Sequence[Row]) -> None:
    out = console()
    rows = []
    for plugin in registry.plugins.values():
        method = plugin.method
        names = f"[bold]{escape(method.name)}[/]" if method else f"[dim]{escape(plugin.name)} (no method)[/]"
        origin = f"[dim]{escape(f'{plugin.distribution} {plugin.version}')}[/]"
        if method:
            aliases = [f"[dim]also: {escape(', '.join(method.aliases))}[/]"] if method.aliases else []
            about = "\n".join([escape(method.summary), *aliases, origin])
            rows.append((names, _bits(method), fill(_devices(method), DEVICES_WIDTH), about))
        else:
            rows.append((names, "-", "-", origin))
    if rows:
        columns = ("method", "bits", "devices", "description and source")
        out.print(table("Quantization methods", columns, rows, wrap=columns[-1:]))
    else:
        out.print(
            "No plugin can be used; the reasons are below."
            if registry.failures or registry.disabled
            else "No plugin is installed. Install one, e.g. `pip install 'quantserve\\[all]'`."
        )
    if registry.failures:
        failed = [
            (
                f"[red]{escape(f.name)}[/]",
                escape(f"{f.distribution} {f.version}"),
                f.stage,
                f"{escape(f.reason)}\n[green]fix[/] {escape(f.advice)}",
            )
            for f in registry.failures
        ]
        out.print(
            table(
                "Plugins that failed",
                ("plugin", "distribution", "stage", "reason"),
                failed,
                wrap=("distribution", "reason"),
            )
        )
    if commands:
        shown = [(f"[bold]{escape(c.name)}[/]", escape(f"{c.distribution} {c.version}"), c.text()) for c in commands]
        heads = ("command", "distribution", "state")
        out.print(table("Commands of other distributions", heads, shown, wrap=heads[1:]))
    for entry in registry.disabled:
        out.print(f"[dim]switched off: {escape(entry.name)} ({escape(entry.distribution)}): {escape(entry.reason)}[/]")
    for note in (*registry.notes, *(note for plugin in registry.plugins.values() for note in plugin.notes)):
        out.print(f"[yellow]note[/] {escape(note)}")


def _bits(method: Method) -> str:
    """Widths as ``2-4, 8``."""
    runs: list[list[int]] = []
    for width in sorted(method.bits):
        if runs and width == runs[-1][-1] + 1:
            runs[-1].append(width)
        else:
            runs.append([width])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _devices(method: Method) -> str:
    """``cuda 7.5+, cpu``: device types, CUDA with the lowest compute capability."""
    lowest = f" {method.minimum_capability / 10:.1f}+" if method.minimum_capability else ""
    return ", ".join(device + (lowest if device == "cuda" else "") for device in method.devices)


def _as_json(registry: Registry) -> dict[str, object]:
    return {
        "plugins": [
            {
                "name": p.name,
                "distribution": p.distribution,
                "version": p.version,
                "engine_side": p.has_engine_side,
                "import_s": round(p.import_s, 3),
                "notes": list(p.notes),
                "method": p.method.to_json() if p.method else None,
            }
            for p in registry.plugins.values()
        ],
        "failures": [
            {
                "name": f.name,
                "distribution": f.distribution,
                "version": f.version,
                "stage": f.stage,
                "reason": f.reason,
                "fix": f.advice,
            }
            for f in registry.failures
        ],
        "disabled": [
            {"name": d.name, "distribution": d.distribution, "version": d.version, "reason": d.reason}
            for d in registry.disabled
        ],
        "notes": list(registry.notes),
    }
