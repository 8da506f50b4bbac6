"""``quantserve check``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

import click
from rich.console import Console
from rich.markup import escape

from quantserve.cli.output import console, kv_cache, print_findings, print_json, table, target_label
from quantserve.cli.sources import Outcome, choose_target, load_sources, outcomes, source_options
from quantserve.finding import Severity
from quantserve.plugins.registry import Registry
from quantserve.target import Target, gib


@click.command("check")
@source_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(sources: tuple[str, ...], target_name: str | None, as_json: bool, **bare: object) -> int:
    """Check models from file headers, without loading weights or using a GPU.

    Reads config.json, quantization configs and safetensors headers, never weights. Exits 1 when a model has errors.
    """
    app = load_sources(sources, **bare)  # type: ignore[arg-type]
    target = choose_target(target_name)
    results = list(outcomes(app.models, Registry.load(), target))
    if as_json:
        print_json({"target": asdict(target), "notes": app.notes, "models": [_as_json(r) for r in results]})
    else:
        print_report(console(), results, target, app.notes)
    return max((result.exit_code for result in results), default=0)


def print_report(out: Console, results: Sequence[Outcome], target: Target, notes: Sequence[str]) -> None:
    """A table of all models, then the findings of each."""
    print_notes(out, notes)
    out.print(
        table(
            f"Checked for {target_label(target)}",
            ("model", "method", "weights", "KV cache holds", "result"),
            map(_row, results),
            wrap=("model", "KV cache holds", "result"),
        )
    )
    for result in results:
        findings = result.composition.findings if result.composition else ()
        if result.error or findings:
            out.print(f"\n[bold]{escape(result.model.model_id)}[/] [dim]{escape(result.model.where)}[/]")
        if result.error:
            message, _, fix = str(result.error).partition("\n  fix: ")
            out.print(f"  [red]error[/]   {escape(message)}")
            if fix:
                out.print(f"          [green]fix[/] {escape(fix)}")
        print_findings(out, findings)


def print_notes(out: Console, notes: Sequence[str]) -> None:
    """What loading the config had to say: renamed keys, settings without effect."""
    for note in notes:
        out.print(f"[yellow]note[/] {escape(note)}")


def _row(result: Outcome) -> tuple[str, ...]:
    model_id = escape(result.model.model_id)
    composition = result.composition
    if composition is None:
        method = escape(result.model.quantization or "?")
        return model_id, method, "-", "-", "[red]cannot be checked[/]"
    counts = Counter(finding.severity for finding in composition.findings)
    if counts[Severity.ERROR]:
        verdict = f"[red]refused: {_count(counts[Severity.ERROR], 'error')}[/]"
    elif counts[Severity.WARNING]:
        verdict = f"[yellow]ok, {_count(counts[Severity.WARNING], 'warning')}[/]"
    else:
        verdict = "[green]ok[/]"
    method = escape(composition.method.name) if composition.method else "[red]none[/]"
    memory = composition.memory
    weights = gib(memory.weights_bytes) if memory else gib(composition.checkpoint.weight_bytes)
    if memory and (ranks := result.model.tensor_parallel_size) > 1:
        weights = f"{ranks} x {weights}"
    return model_id, method, weights, kv_cache(asdict(memory)) if memory else "-", verdict


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _as_json(result: Outcome) -> dict[str, object]:
    head: dict[str, object] = {
        "model_id": result.model.model_id,
        "source": result.model.source,
        "where": result.model.where,
        "exit_code": result.exit_code,
    }
    if result.composition is None:
        return {**head, "error": str(result.error), "error_type": type(result.error).__name__}
    composition = result.composition
    return {
        **head,
        "method": composition.method.name if composition.method else None,
        "plugins": [plugin.name for plugin in composition.plugins],
        "memory": composition.memory.to_json() if composition.memory else None,
        "findings": [finding.to_json() for finding in composition.findings],
    }
