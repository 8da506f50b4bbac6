"""``quantserve list``."""

from __future__ import annotations

from textwrap import fill

import click
from rich.markup import escape

from quantserve.cli.output import console, print_json, table
from quantserve.method import Method
from quantserve.plugins.registry import Registry

ALIASES_WIDTH = 21  # leaves room for the rest on 80 columns


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
            names += f"\n[dim]{escape(fill(', '.join(method.aliases), ALIASES_WIDTH))}[/]"
        origin = f"[dim]{escape(f'{plugin.distribution} {plugin.version}')}[/]"
        rows.append(
            (
                names,
                "/".join(map(str, method.bits)) if method else "-",
                _devices(method) if method else "-",
                f"{escape(method.summary)}\n{origin}" if method else origin,
            )
        )
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
    for entry in registry.disabled:
        out.print(f"[dim]switched off: {escape(entry.name)} ({escape(entry.distribution)}): {escape(entry.reason)}[/]")
    for note in (*registry.notes, *(note for plugin in registry.plugins.values() for note in plugin.notes)):
        out.print(f"[yellow]note[/] {escape(note)}")


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
