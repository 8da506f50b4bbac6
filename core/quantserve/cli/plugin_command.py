"""``quantserve plugin list | check | info``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click
from rich.console import Console
from rich.markup import escape

from quantserve import __version__
from quantserve.cli.output import console, must_be_writable, print_json, table, write_file
from quantserve.errors import UsageError, one_line
from quantserve.hookspecs import API_MINOR, API_VERSION
from quantserve.plugins import record
from quantserve.plugins.contract import HOOKS
from quantserve.plugins.plugin import Disabled, Failure, Plugin
from quantserve.plugins.registry import GROUP, Registry

if TYPE_CHECKING:
    from quantserve.testing import Case, Report

COLOURS = {"passed": "green", "failed": "red", "expected": "yellow", "skipped": "dim"}


@click.group("plugin")
def command() -> None:
    """Show the installed plugins, what each is capable of, and whether it keeps its contracts."""


# --- list -------------------------------------------------------------------------------------------------


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_plugins(as_json: bool) -> None:
    """Show the installed plugins with their capabilities and health."""
    registry = Registry.load()
    every: list[Plugin | Failure | Disabled] = [*registry.plugins.values(), *registry.failures, *registry.disabled]
    rows = [_row(one) for one in every]
    rows.sort(key=lambda row: str(row["name"]))
    if as_json:
        print_json({"plugins": rows})
        return
    cells = [
        (
            f"[bold]{escape(row['name'])}[/]",
            escape(f"{row['distribution']} {row['version']}"),
            escape(", ".join(row["capabilities"]) or "-"),
            escape("\n".join(row["proven"]) or "-"),
            _health(row),
        )
        for row in rows
    ]
    columns = ("plugin", "distribution", "capabilities", "proven with", "health")
    console().print(table("Plugins", columns, cells, wrap=columns[1:]))


def _row(one: Plugin | Failure | Disabled) -> dict[str, Any]:
    """A plugin as plain data; `health` is ``ok``, ``failed`` or ``disabled``."""
    row: dict[str, Any] = {"name": one.name, "distribution": one.distribution, "version": one.version}
    if isinstance(one, Plugin):
        proven, unreadable = record.runs_of(one.package)
        notes = [*one.notes, *([unreadable] if unreadable else [])]
        texts = [_proven(run, one) for run in proven[-1:]]
        return {**row, "capabilities": capabilities(one), "proven": texts, "health": "ok", "notes": notes}
    failed = isinstance(one, Failure)
    notes = [one.reason, *([f"fix: {one.advice}"] if isinstance(one, Failure) else [])]
    return {**row, "capabilities": [], "proven": [], "health": "failed" if failed else "disabled", "notes": notes}


def _proven(run: record.Run, plugin: Plugin) -> str:
    """A run of the kit in a line; it may be of another version of the plugin."""
    return run.text + (f", in version {run.version}" if run.version != plugin.version else "")


def _health(row: Mapping[str, Any]) -> str:
    colour = {"ok": "green", "failed": "red"}.get(row["health"], "dim")
    return "\n".join([f"[{colour}]{row['health']}[/]", *(escape(note) for note in row["notes"])])


def capabilities(plugin: Plugin) -> list[str]:
    """What the method and the hooks of a plugin tell: ``method``, devices, tools."""
    tools = [name for name in ("reader", "quantizer", "converter") if f"quantserve_{name}" in hooks(plugin)]
    method = ["method", *plugin.method.devices] if plugin.method else []
    return [*method, *(["engine side"] if plugin.has_engine_side else []), *tools]


def hooks(plugin: Plugin) -> list[str]:
    """The hooks that a plugin implements, in the order of the contract."""
    return [name for name in HOOKS if hasattr(plugin.module, name)]


# --- info -------------------------------------------------------------------------------------------------


@command.command("info")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(name: str, as_json: bool) -> None:
    """Show one plugin: its distribution, versions, hooks and a badge for its README.

    The versions of vLLM and Ray are those with which it passed the conformance kit, as `plugin check --record` wrote
    them into its package.
    """
    registry = Registry.load()
    plugin = registry.find_plugin(name)
    facts = about(plugin, registry)
    if as_json:
        print_json(facts)
        return
    out = console()
    out.print(f"[bold]{escape(plugin.name)}[/] {escape(plugin.distribution)} {escape(plugin.version)}")
    for key, value in facts.items():
        if key not in ("name", "distribution", "version", "badge") and value:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            out.print(f"  {key:13} {escape(shown)}", soft_wrap=True)
    out.print(f"\n{escape(str(facts['badge']))}", soft_wrap=True)


def about(plugin: Plugin, registry: Registry) -> dict[str, object]:
    """What `info` shows."""
    point = next(one for one in registry.points.select(group=GROUP) if one.name == plugin.name and one.dist)
    dist, method = point.dist, plugin.method
    assert dist is not None
    summary, (proven, _) = _metadata(dist, "Summary"), record.runs_of(plugin.package)
    return {
        "name": plugin.name,
        "distribution": plugin.distribution,
        "version": plugin.version,
        "summary": method.summary if method else summary,
        "license": _metadata(dist, "License-Expression") or _metadata(dist, "License"),
        "homepage": method.homepage if method else "",
        "names": list(method.names) if method else [],
        "bits": list(method.bits) if method else [],
        "dtypes": list(method.dtypes) if method else [],
        "capabilities": capabilities(plugin),
        "hooks": hooks(plugin),
        "api": f"{method.api if method else API_VERSION}, and quantserve {__version__} has {API_VERSION}.{API_MINOR}",
        "requires": [line for line in dist.requires or () if "extra ==" not in line],
        "proven": [f"API {run.api}, quantserve {run.quantserve}, {_proven(run, plugin)}" for run in proven],
        "badge": badge(plugin.name, method.homepage if method else "", proven[-1] if proven else None),
    }


def _metadata(dist: Distribution, key: str) -> str:
    return str(dist.metadata[key]) if key in dist.metadata else ""


def badge(name: str, homepage: str = "", run: record.Run | None = None) -> str:
    """A line of Markdown for a README, with what the plugin was proven with."""
    proven = (
        [f"vLLM {run.vllm}", f"{run.checks} checks"] if run and run.vllm else [f"{run.checks} checks"] if run else []
    )
    said = [f"API {API_VERSION}", *proven]
    image = f"https://img.shields.io/badge/quantserve%20plugin-{quote(' · '.join(said).replace('-', '--'))}-2b7a78"
    text = f"![quantserve plugin {name}: {', '.join(said)}]({image})"
    return f"[{text}]({homepage})" if homepage else text


# --- check ------------------------------------------------------------------------------------------------


@command.command("check")
@click.argument("name")
@click.option("--case", "case_file", metavar="FILE", help="Python file with the plugin's `quantserve.testing.Case`.")
@click.option("--model", metavar="PATH", help="Good checkpoint of the plugin's format, for a plugin without a case.")
@click.option("--engine", is_flag=True, help="Run the checks that start an engine, too; takes minutes.")
@click.option("--only", metavar="ID", multiple=True, help="Checks whose ids begin so, such as V or N01; repeatable.")
@click.option("--first", is_flag=True, help="Stop at the first check that fails.")
@click.option("--junit", metavar="FILE", help="Write the XML of JUnit.")
@click.option("--record", "record_file", metavar="FILE", help="Where all pass, add the versions to conformance.json.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(
    name: str,
    case_file: str | None,
    model: str | None,
    engine: bool,
    only: tuple[str, ...],
    first: bool,
    junit: str | None,
    record_file: str | None,
    as_json: bool,
) -> int:
    """Run the conformance kit on a plugin: contracts, detection, damaged checkpoints, numerics.

    Without a case the kit writes a checkpoint by the plugin's scheme. Exits 3 when a check fails. --record FILE is for
    conformance.json in the folder of the plugin's package, which `plugin list` and `plugin info` read.
    """
    from quantserve.testing import Case, run_checks

    if case_file and model:
        raise UsageError("--case and --model exclude each other\n  fix: name the checkpoint in the case")
    cases = _cases(Path(case_file), name) if case_file else [Case(name, checkpoint=Path(model) if model else None)]
    if record_file and (only or first):
        raise UsageError("--record is for all checks\n  fix: leave out --only and --first")
    for file in filter(None, (junit, record_file)):
        must_be_writable(Path(file))
    reports = [run_checks(case, engine=engine, only=only, first=first) for case in cases]
    if not any(report.results for report in reports):
        engine_only = "" if engine else "; those of group E run with --engine"
        raise UsageError(
            f"none of the checks {', '.join(only)} applies to {name!r}{engine_only}\n"
            "  fix: leave out --only; docs/conformance.md says what each check applies to"
        )
    failed = any(report.failed for report in reports)
    if record_file and not failed:
        record.write(Path(record_file), name, _run(name, reports))
    if junit:
        write_file(Path(junit), reports[0].to_junit() if len(reports) == 1 else _suites(reports))
    if as_json:
        print_json({"reports": [report.to_json() for report in reports]})
    else:
        for report in reports:
            print_report(console(), report)
        if not (failed or only or first):
            console().print(f"\n{escape(badge(name, run=_run(name, reports)))}", soft_wrap=True)
    return max(report.exit_code for report in reports)


def _run(name: str, reports: Iterable[Report]) -> record.Run:
    """What was proven here."""
    plugin = Registry.load().find_plugin(name)
    passed = [one.check for report in reports for one in report.results if one.outcome == "passed"]
    engine = any(check.opt_in for check in passed)
    return record.run_here(plugin.version, f"{API_VERSION}.{API_MINOR}", len(passed), engine=engine)


def print_report(out: Console, report: Report) -> None:
    """One line for each check, and what is wrong with those that failed."""
    rows = []
    for one in report.results:
        problems = "\n".join(escape(problem) for problem in one.problems)
        fix = f"\n[green]fix[/] {escape(one.check.fix)}" if one.outcome == "failed" else ""
        rows.append((one.check.id, f"[{COLOURS[one.outcome]}]{one.outcome}[/]", f"{problems}{fix}"))
    out.print(table(f"Plugin {escape(report.name)}", ("check", "outcome", "what"), rows, wrap=("what",)))
    out.print(", ".join(f"{count} {outcome}" for outcome, count in report.counts.items()))


def _suites(reports: Iterable[Report]) -> str:
    suites = (report.to_junit().partition("?>")[2].strip() for report in reports)
    return f"<?xml version='1.0' encoding='utf-8'?>\n<testsuites>{''.join(suites)}</testsuites>\n"


def _cases(file: Path, name: str) -> list[Case]:
    """The cases of a plugin in a Python file, at module level or in a list or tuple there.

    Raises:
        UsageError: there is no such file, it cannot be imported, or has no such case.
    """
    from quantserve.testing import Case

    spec = importlib.util.spec_from_file_location(f"_case_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UsageError(f"--case: {file} is no Python file\n  fix: name the file with the plugin's Case")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(file.resolve().parent))  # for modules beside it, as pytest has them
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"--case: {file} cannot be imported: {one_line(error)}\n  fix: correct it") from error
    finally:
        sys.path.remove(str(file.resolve().parent))
    values = list(vars(module).values())
    nested = [one for value in values if isinstance(value, list | tuple) for one in value]
    every = list({id(value): value for value in [*values, *nested] if isinstance(value, Case)}.values())
    if not (found := [case for case in every if case.name == name]):
        known = ", ".join(sorted({case.name for case in every})) or "none"
        raise UsageError(f"--case: {file} has no case of {name!r} (its cases: {known})\n  fix: add Case({name!r}, ...)")
    return found
