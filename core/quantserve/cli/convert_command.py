"""``quantserve convert``."""

from __future__ import annotations

import os
from pathlib import Path

import click
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from quantserve.cli.output import console
from quantserve.errors import CheckpointError, PluginError, UsageError, one_line
from quantserve.plugins.registry import Hooks, Plugin, Registry
from quantserve.system.homes import expand, settle


@click.command("convert")
@click.argument("source")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--method", metavar="METHOD", help="Quantization method of the files; needed if several methods have a converter."
)
@click.option(
    "--base",
    metavar="MODEL",
    help="Unquantized model that supplies what SOURCE lacks, for LLaMA-1 style SqueezeLLM files.",
)
@click.option("--allow-pickle", is_flag=True, help="Read .pt/.bin files, with an unpickler that executes no code.")
def command(source: str, destination: Path, method: str | None, base: str | None, allow_pickle: bool) -> None:
    """Convert foreign checkpoint files to a safetensors folder.

    SOURCE is a file, a folder or a hub id. DESTINATION must not exist; it is created only when
    it is complete.
    """
    plugin, converter = _converter(Registry.load(), method, Path(source).suffix)
    out = console(stderr=True)
    for note in settle(os.environ):  # for downloads and torch
        out.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    source_path = local_path(source)
    if os.path.lexists(destination):
        raise UsageError(f"{destination} exists already\n  fix: name a new folder, or remove it first")
    base_path = local_path(base) if base else None
    convert = plugin.load_callable(converter)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        with plugin.tool("converter"):
            convert(source_path, destination, base=base_path, allow_pickle=allow_pickle, progress=progress)
    out.print(f"wrote {destination}; next: quantserve check {destination}")


def local_path(source: str) -> Path:
    """An existing path; a hub id is downloaded to the HF cache, including weights."""
    path = expand(source)
    try:
        if path.exists():
            return path
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error.strerror}") from None
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{source}: no such file or folder, and not a hub id (org/name)\n  fix: correct the path or the id"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{source}: no such path, and downloading it as a hub id failed: {one_line(error)}\n"
            "  fix: check the spelling, HF_TOKEN for gated models, and HF_HUB_OFFLINE"
        ) from error


def _converter(registry: Registry, method: str | None, suffix: str) -> tuple[Plugin, str]:
    """The converter of a method; else of the plugin that reads files of the suffix, or of those that read none."""
    every = [plugin for plugin in registry.plugins.values() if plugin.method]
    readers = [plugin for plugin in every if plugin.reader and suffix in plugin.reader.suffixes]
    candidates = [registry.find_method(method)] if method else readers or [p for p in every if not p.reader]
    hooks = Hooks(candidates)
    found: list[tuple[Plugin, str]] = []
    defects: list[PluginError] = []
    for plugin in candidates:
        try:
            if reference := hooks.call(plugin, "quantserve_converter"):
                found.append((plugin, reference))
        except PluginError as error:
            defects.append(error)
    if defects and not found:
        raise defects[0]
    if len(found) == 1:
        return found[0]
    if method:
        raise UsageError(f"method {method!r} has no converter: its checkpoints are served directly, without conversion")
    if not found:
        raise UsageError(
            "no installed plugin has a converter\n"
            "  fix: install the plugin of the files' method; `quantserve list` shows what is installed"
        )
    names = ", ".join(p.method.name for p, _ in found if p.method)
    raise UsageError(f"several methods have a converter\n  fix: choose one with --method ({names})")
