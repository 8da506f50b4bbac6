"""What ``quantserve quantize`` does once its options are known."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from quantserve.cli.convert_command import local_path
from quantserve.cli.output import console
from quantserve.errors import UsageError
from quantserve.plugins.registry import Hooks, Plugin, Registry
from quantserve_quantize.card import few_tokens
from quantserve_quantize.options import click_options
from quantserve_quantize.quantizer import Quantizer
from quantserve_quantize.run import Asked, quantize

SHOWN = 8


def quantizer_class(method: str) -> tuple[Plugin, type[Quantizer]]:
    """The quantizer of a method.

    Raises:
        UsageError: the method is unknown, has none, or one that is a function.
        PluginError: what its hook names is no quantizer.
    """
    plugin, found = named_quantizer(method)
    if not isinstance(found, type):
        raise UsageError(f"the quantizer of {method!r} is a function, which only writes checkpoints")
    if not issubclass(found, Quantizer):
        raise plugin.defect("quantizer", f"{found.__module__}:{found.__name__} is no quantserve_quantize.Quantizer")
    return plugin, found


def named_quantizer(method: str) -> tuple[Plugin, Callable[..., Any]]:
    """What the hook of a method's plugin names: a `Quantizer`, or a function that writes a whole checkpoint.

    Raises:
        UsageError: the method is unknown or has none.
        PluginError: it cannot be imported.
    """
    registry = Registry.load()
    plugin = registry.find_method(method)
    reference = Hooks([plugin]).call(plugin, "quantserve_quantizer")
    if not reference:
        able = ", ".join(sorted(p.method.name for p in registry.plugins.values() if p.method and _has_quantizer(p)))
        raise UsageError(f"method {method!r} has no quantizer\n  fix: choose one of {able}")
    return plugin, plugin.load_callable(reference)


def _has_quantizer(plugin: Plugin) -> bool:
    return bool(Hooks([plugin]).call(plugin, "quantserve_quantizer"))


def method_options(method: str) -> list[click.Option]:
    """The options of a method's quantizer; none for a method without one, which `run` refuses."""
    try:
        _, found = quantizer_class(method)
    except UsageError:
        return []
    options = click_options(found.Options)
    for option in options:
        option.of_method = True  # type: ignore[attr-defined]
    return options


def run(
    model: str,
    method: str,
    out: Path,
    asked: Asked,
    options: Mapping[str, Any],
    resume: bool,
    as_json: bool,
    began: float,
) -> int:
    """Quantize, show progress, and print what came out."""
    plugin, named = named_quantizer(method)
    folder = local_path(model)
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is a file\n"
            "  fix: give the folder of a checkpoint in safetensors; `quantserve convert` makes one of other files"
        )
    err = console(stderr=True)
    if not isinstance(named, type):  # as the hook was in API 1.0
        return _run_function(plugin, named, folder, out, err)
    _, found = quantizer_class(method)
    name = plugin.method.name if plugin.method else method
    with plugin.tool("quantizer", alone=False), bars(err) as progress:
        quantizer = found(found.Options(**options))
        report = quantize(folder, out, quantizer, name, asked, resume, progress)
    if as_json:
        click.echo(json.dumps({**report, "folder": str(out)}))
    else:
        show(report)
        if "few_tokens" in report:
            err.print(f"[yellow]note[/] {escape(few_tokens(report))}", soft_wrap=True)
        err.print(
            f"wrote {escape(str(out))} in {time.monotonic() - began:.0f} s; next: quantserve check {escape(str(out))}"
        )
    return 0


def _run_function(plugin: Plugin, function: Callable[..., Any], folder: Path, out: Path, err: Console) -> int:
    if os.path.lexists(out):
        raise UsageError(f"{out} exists already\n  fix: name a new folder, or remove it first")
    with plugin.tool("quantizer"), bars(err) as progress:
        function(folder, out, progress=progress)
    err.print(f"wrote {escape(str(out))}; next: quantserve check {escape(str(out))}")
    return 0


@contextlib.contextmanager
def bars(out: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars, one for each kind of work: a function of the kind, how much is done, and how much there is."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=out, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(escape(what), total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield progress


def show(report: Mapping[str, Any]) -> None:
    """A table of the linears with the largest errors."""
    layers = report["layers"]
    rows = sorted(layers.items(), key=lambda row: -(row[1]["output_error"] or row[1]["weight_error"]))[:SHOWN]
    table = Table(
        title=f"{report['bits_per_weight']:.2f} bits per weight; the largest errors of {len(layers)} linears",
        title_justify="left",
    )
    for heading in ("linear", "error of the weight", "error of the output"):
        table.add_column(heading)
    for name, row in rows:
        output = "" if row["output_error"] is None else f"{100 * row['output_error']:.2f} %"
        table.add_row(escape(name), f"{100 * row['weight_error']:.2f} %", output)
    console().print(table)
