"""``quantserve list``."""

from __future__ import annotations

import click
from rich.markup import escape

from quantserve.cli.output import console, print_json, table
from quantserve.registry import Registry


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Show the installed quantization methods, and plugins that failed.

    A broken plugin is a row, not a crash; QUANTSERVE_DISABLE=a,b and QUANTSERVE_PLUGINS=a choose what is loaded.
    """
    registry = Registry.load()
    if as_json:
        print_json(_as_json(registry))
    else:
        _print(registry)


def _print(registry: Registry) -> None:
    out = console()
    rows = []
    for plugin in registry.plugins.values():
        method = plugin.method
        names = f"[bold]{escape(method.name)}[/]" if method else f"[dim]{escape(plugin.name)} (no method)[/]"
        if method and method.aliases:
            names += f"\n[dim]{escape(', '.join(method.aliases))}[/]"
        rows.append(
            (
                names,
                "/".join(map(str, method.bits)) if method else "-",
                "/".join(method.devices) if method else "-",
                f"{method.minimum_capability / 10:.1f}" if method and method.minimum_capability else "-",
                escape(f"{plugin.distribution} {plugin.version}"),
                escape(method.summary) if method else "",
            )
        )
    columns = ("method", "bits", "devices", "min. capability", "distribution", "summary")
    if rows:
        out.print(table("Quantization methods", columns, rows))
    else:
        out.print("No plugin is installed. Install one, e.g. `pip install quantserve\\[all]`.")
    if registry.failures:
        failed = [
            (f"[red]{escape(f.name)}[/]", escape(f"{f.distribution} {f.version}"), f.stage, escape(f.reason))
            for f in registry.failures
        ]
        out.print(table("Plugins that failed", ("plugin", "distribution", "stage", "reason"), failed))
    for entry in registry.disabled:
        out.print(f"[dim]switched off: {escape(entry.name)} ({escape(entry.distribution)}): {escape(entry.reason)}[/]")
    for note in registry.notes:
        out.print(f"[yellow]note[/] {escape(note)}")


def _as_json(registry: Registry) -> dict[str, object]:
    return {
        "plugins": [
            {
                "name": p.name,
                "distribution": p.distribution,
                "version": p.version,
                "engine_side": p.has_engine_side,
                "method": p.method.to_json() if p.method else None,
            }
            for p in registry.plugins.values()
        ],
        "failures": [
            {"name": f.name, "distribution": f.distribution, "version": f.version, "stage": f.stage, "reason": f.reason}
            for f in registry.failures
        ],
        "disabled": [
            {"name": d.name, "distribution": d.distribution, "version": d.version, "reason": d.reason}
            for d in registry.disabled
        ],
        "notes": list(registry.notes),
    }
