"""``quantserve new-plugin``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from quantserve.cli import main
from quantserve.errors import UsageError
from quantserve.families import quantization_methods
from quantserve.new_plugin import GROUP_SIZES, KINDS, WIDTHS, Project, check, note, spelling

F = TypeVar("F", bound=Callable[..., Any])


def _kinds(function: F) -> F:
    for kind in reversed(tuple(KINDS)):
        function = click.option(f"--{kind}", is_flag=True, help=KINDS[kind].about)(function)
    return function


@click.command("new-plugin")
@click.argument("name", required=False)
@_kinds
@click.option("--folder", type=click.Path(path_type=Path), help="A new folder to write; default ./quantserve-NAME.")
@click.option("--summary", metavar="TEXT", help="One line about it.")
@click.option("--author", metavar="TEXT", help="'Name' or 'Name <mail>', for the package index.")
@click.option("--license", metavar="SPDX", default="Apache-2.0", show_default=True, help="License of the distribution.")
@click.option("--bits", type=click.Choice(WIDTHS), help="Width of a code; default 4.")
@click.option("--group-size", type=click.Choice(GROUP_SIZES), help="Inputs that share a scale; default 32.")
@click.option("--vllm-name", metavar="METHOD", help="vLLM's name of its method, for --vllm-method; default NAME.")
@click.option("--no-input", is_flag=True, help="Ask nothing, also on a terminal.")
def command(name: str | None, no_input: bool, **options: Any) -> None:
    """Write a complete distribution for a plugin NAME: it installs, lints, type-checks and passes its tests.

    The distribution is called quantserve-NAME. On a terminal what is not given is asked for. docs/plugins.md leads
    from there to a method that is served.
    """
    answers = _asked if not no_input and sys.stdin.isatty() and sys.stderr.isatty() else _given
    project = answers(name, [kind for kind in KINDS if options.pop(kind.replace("-", "_"))], options)
    folder: Path = options["folder"] or Path(project.distribution)
    check(project, (*main.COMMANDS, *main.EXTRAS))
    written = project.write(folder)
    click.echo(f"wrote {len(written)} files into {folder}", err=True)
    if remark := note(project):
        click.echo(f"note: {remark}", err=True)
    extras = "engine,test" if project.kind in ("codebook", "custom") else "test"
    click.echo(f"next: cd {shlex.quote(str(folder))} && pip install --editable '.[{extras}]' && pytest", err=True)


def _given(name: str | None, kinds: list[str], options: dict[str, Any]) -> Project:
    """The project that the options describe.

    Raises:
        UsageError: the name or the kind is missing, or an option is for another kind.
    """
    flags = ", ".join(f"--{kind}" for kind in KINDS)
    if not name:
        raise UsageError("a name is missing\n  fix: quantserve new-plugin mymethod --codebook")
    if len(kinds) != 1:
        said = "no kind is given" if not kinds else f"{' and '.join(f'--{kind}' for kind in kinds)} exclude each other"
        raise UsageError(f"{said}\n  fix: give one of {flags}")
    (kind,) = kinds
    for option, fitting in (
        ("bits", ("codebook", "vllm-method")),
        ("group_size", ("codebook", "vllm-method")),
        ("vllm_name", ("vllm-method",)),
    ):
        if options[option] is not None and kind not in fitting:
            goes = " and ".join(f"--{one}" for one in fitting)
            raise UsageError(f"--{option.replace('_', '-')} goes with {goes}, not --{kind}\n  fix: leave it out")
    return Project(
        name,
        kind,
        summary=(options["summary"] or "").strip(),
        author=(options["author"] or "").strip(),
        license=options["license"].strip(),
        bits=options["bits"] or 4,
        group_size=options["group_size"] or 32,
        vllm_name=(options["vllm_name"] or name) if kind == "vllm-method" else "",
    )


def _asked(name: str | None, kinds: list[str], options: dict[str, Any]) -> Project:
    """The project, after questions about what the options leave open."""
    name = name or click.prompt("Name", value_proc=_spelt, err=True)
    if not kinds:
        for kind, about in KINDS.items():
            click.echo(f"  {kind:12} {about.about}", err=True)
        kinds = [click.prompt("Kind", type=click.Choice(tuple(KINDS)), default="codebook", err=True)]
    if kinds == ["vllm-method"] and not options["vllm_name"]:
        choice = click.Choice(sorted(quantization_methods()))
        options["vllm_name"] = click.prompt("vLLM's name of the method", type=choice, err=True)
    if kinds in (["codebook"], ["vllm-method"]):
        for option, question, choices in (
            ("bits", "Bits of a code", WIDTHS),
            ("group_size", "Inputs that share a scale", GROUP_SIZES),
        ):
            if options[option] is None:
                default = 4 if option == "bits" else 32
                options[option] = click.prompt(question, type=click.Choice(choices), default=default, err=True)
    project = _given(name, kinds, options)
    if options["summary"] is None:
        options["summary"] = click.prompt("Summary", default=project.description, err=True)
    if options["author"] is None:
        options["author"] = click.prompt("Author, 'Name <mail>'", default="", show_default=False, err=True)
    return _given(name, kinds, options)


def _spelt(name: str) -> str:
    """The name, if it can be one.

    Raises:
        UsageError: it cannot; click asks again.
    """
    if wrong := spelling(name.strip()):
        raise click.UsageError("; ".join(wrong))
    return name.strip()
