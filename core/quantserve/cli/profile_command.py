"""``quantserve profile``."""

from __future__ import annotations

from collections.abc import Sequence

import click
from rich.console import Console
from rich.markup import escape

from quantserve.cli.estimates import (
    MOST_USERS,
    advice_for,
    candidate_json,
    devices,
    integers,
    number,
    source_of,
    weights,
    within,
)
from quantserve.cli.output import console, print_json, table, target_label
from quantserve.cli.sources import choose_target
from quantserve.planning.advise import Advice, Candidate
from quantserve.planning.expectation import fitted
from quantserve.predict.machine import ENGINE_2023, ENGINE_NOW
from quantserve.predict.workload import WORKLOADS, Workload

TABLE = (
    "Method",
    "Mean E2E\n(ms)",
    "Mean TTFT\n(ms)",
    "Mean ITL\n(ms/token)",
    "Mean throughput\n(tok/s)",
    "within",
    "source",
)
PARTS = ("linears", "lm_head", "attention", "vectors", "communication", "overhead")


@click.command("profile")
@click.argument("source", metavar="MODEL")
@click.option("--target", "target_name", metavar="NAME",
              help="Hardware, e.g. a100-80g, 4xh100, cpu; default: this machine.")  # fmt: skip
@click.option("--method", "methods", multiple=True, metavar="METHOD", help="Only this method; may be repeated.")
@click.option("--concurrency", default="1,4,16,64", show_default=True, help="Numbers of clients in the second table.")
@click.option("--input-tokens", type=click.IntRange(1, 1 << 20), default=512, show_default=True,
              help="Prompt tokens per request in the second table.")  # fmt: skip
@click.option("--output-tokens", type=click.IntRange(1, 1 << 20), default=128, show_default=True,
              help="Answer tokens per request in the second table.")  # fmt: skip
@click.option("--tensor-parallel-size", "ranks", type=click.IntRange(1, 64),
              help="Tensor parallel size; default: the smallest that fits.")  # fmt: skip
@click.option("--engine", type=click.Choice([ENGINE_NOW, ENGINE_2023]), default=ENGINE_NOW, show_default=True,
              help="Engine version to predict for.")  # fmt: skip
@click.option("--explain", is_flag=True, help="Show the parts of the time of a decode step.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    source: str,
    target_name: str | None,
    methods: tuple[str, ...],
    concurrency: str,
    input_tokens: int,
    output_tokens: int,
    ranks: int | None,
    engine: str,
    explain: bool,
    as_json: bool,
) -> int:
    """Print the performance to expect of MODEL: published numbers beside a prediction.

    MODEL is a folder (a bare config.json is enough), a hub id or a model file. The first table has the layout and the
    workload of RayLLM's benchmarks of 2023; the second shows other numbers of clients.
    """
    target = choose_target(target_name)
    users = integers(concurrency, "--concurrency", MOST_USERS)
    advice = advice_for(source, target, methods, ranks, engine, as_published=True)
    loads = [Workload("closed loop", input_tokens, output_tokens, count) for count in users]
    if as_json:
        print_json(_as_json(advice, loads, engine))
        return advice.exit_code
    out = console()
    print_reference(out, advice, engine)
    print_loads(out, advice, loads)
    if explain:
        print_steps(out, advice, loads)
    print_refusals(out, advice)
    print_notes(out, advice)
    return advice.exit_code


def print_reference(out: Console, advice: Advice, engine: str) -> None:
    """The table of 2023, with today's prediction for the same workload under each published row."""
    load = WORKLOADS["rayllm-2023"]
    rows: list[Sequence[str]] = []
    for candidate in advice.candidates:
        label = f"[bold]{escape(candidate.label)}[/]"
        if published := candidate.published:
            figures = (published.e2e_ms, published.ttft_ms, published.itl_ms, published.output_tokens_per_s)
            cells = [f"{value:g}" if value is not None else "-" for value in figures]
            rows.append((label, *cells, "", "published 2023"))
        if prediction := candidate.predict(load):
            figures = (
                prediction.e2e_ms,
                prediction.ttft_ms,
                prediction.itl_ms,
                prediction.tokens_per_s_per_user,
            )
            cells = [number(value) for value in figures]
            which = "" if engine == ENGINE_NOW else f", {engine} formulas"
            on = "" if candidate.ranks == 1 else f", {devices(candidate, advice.target)}"
            rows.append((label, *cells, within(prediction), f"{source_of(prediction, advice)}{on}{which}"))
        if candidate.failed:
            rows.append((label, "-", "-", "-", "-", "", "[red]failed, see below[/]"))
    where = escape(f"{advice.model.model_id} on {target_label(advice.target)}")
    out.print(table(where, TABLE, rows, wrap=("source",)))
    shown = fitted(load, _context(advice))
    out.print(f"  workload  {load.about}" + ("" if shown == load else f"; shortened to the context: {shown}"))
    out.print("  ITL is E2E / output tokens, so TTFT is in it; throughput is per user, not of the server")
    conditions = dict.fromkeys(c.published.conditions for c in advice.candidates if c.published)
    for text in conditions:
        out.print(f"  [dim]published  {escape(text)}[/]", soft_wrap=True)
    for text in dict.fromkeys(t for c in advice.candidates if c.published for t in c.published.caveats):
        out.print(f"  [dim]caveat     {escape(text)}[/]", soft_wrap=True)
    out.print()


def print_loads(out: Console, advice: Advice, loads: Sequence[Workload]) -> None:
    """Predictions over concurrency."""
    rows = []
    for candidate in advice.candidates:
        for load in loads:
            if prediction := candidate.predict(load):
                busy = "" if prediction.most_running == load.concurrency else f" ({prediction.most_running} run)"
                rows.append(
                    (
                        escape(candidate.label),
                        f"{load.concurrency}{busy}",
                        number(prediction.ttft_ms),
                        number(prediction.tpot_ms),
                        number(prediction.e2e_ms),
                        number(prediction.tokens_per_s_per_user),
                        number(prediction.tokens_per_s),
                        within(prediction),
                    )
                )
    load = fitted(loads[0], _context(advice))
    columns = ("Method", "clients", "TTFT ms", "TPOT ms", "E2E ms", "tok/s per user", "tok/s server", "within")
    title = f"Predicted, {load.input_tokens} tokens in and {load.output_tokens} out, closed loop"
    out.print(table(title, columns, rows, wrap=("Method",)))
    out.print("  TPOT is (last token - first token) / (tokens - 1); TTFT from sending to the first token\n")


def print_steps(out: Console, advice: Advice, loads: Sequence[Workload]) -> None:
    """Where the time of a decode step goes."""
    rows = []
    for candidate in advice.candidates:
        for load in loads:
            if prediction := candidate.predict(load):
                step = prediction.decode_step.to_json()
                total = f"{1000 * prediction.decode_step.total:.2f}"
                cells = [f"{step[part]:.2f}" for part in PARTS]
                rows.append((escape(candidate.label), str(load.concurrency), *cells, total))
    columns = ("Method", "clients", *PARTS, "step")
    out.print(table("One decode step in the middle of the answers, ms", columns, rows, wrap=("Method",)))
    for candidate in advice.candidates:
        if made := candidate.made:
            how = "measured here" if made.measured else made.kernel.source
            text = f"{candidate.label}: {made.kernel.name}, {made.linears.bits_per_weight:.2f} bits a weight; {how}"
            out.print(f"  [dim]{escape(text)}[/]", soft_wrap=True)
    if made := next((c.made for c in advice.candidates if c.made), None):
        out.print(f"  [dim]engine: {escape(made.machine.engine.source)}[/]\n", soft_wrap=True)


def print_refusals(out: Console, advice: Advice) -> None:
    """What is left out, and why."""
    refused: dict[str, list[str]] = {}
    for candidate in advice.candidates:
        if candidate.failure:
            message, _, fix = str(candidate.failure).partition("\n  fix: ")
            out.print(f"  [red]{escape(candidate.label)}[/] failed: {escape(message)}", soft_wrap=True)
            out.print(f"    [green]fix[/] {escape(fix)}", soft_wrap=True)
        elif candidate.refusal:
            refused.setdefault(candidate.refusal, []).append(candidate.label)
    for why, labels in refused.items():
        out.print(f"  [red]{escape(', '.join(labels))}[/] left out: {escape(why)}")
    left = [one for one in advice.candidates if one.made is None and not one.failure and not one.refusal]
    for name in dict.fromkeys(candidate.method.name for candidate in left):
        out.print(f"  [yellow]{escape(name)}[/]: its plugin describes no kernel, so there is no prediction")


def print_notes(out: Console, advice: Advice) -> None:
    """What a reader must know about the numbers."""
    for note in advice.notes:
        out.print(f"  [yellow]note[/] {escape(note)}", soft_wrap=True)


def _context(advice: Advice) -> int:
    return next((c.made.max_model_len for c in advice.candidates if c.made), 0)


def _as_json(advice: Advice, loads: Sequence[Workload], engine: str) -> dict[str, object]:
    def of(candidate: Candidate) -> dict[str, object]:
        made = [candidate.predict(load) for load in (WORKLOADS["rayllm-2023"], *loads)]
        first, *rest = [prediction.to_json() if prediction else None for prediction in made]
        return {
            **candidate_json(candidate),
            "weights": weights(candidate),
            "predicted_2023_workload": first,
            "predicted": rest,
        }

    return {
        "model_id": advice.model.model_id,
        "target": advice.target.to_json(),
        "engine": engine,
        "definitions": {
            "ttft_ms": "sending to first token",
            "tpot_ms": "(last token - first token) / (tokens - 1)",
            "itl_ms": "E2E / output tokens (TTFT included)",
            "tokens_per_s_per_user": "mean over requests of output tokens / E2E",
            "tokens_per_s": "output tokens of all requests / duration",
        },
        "methods": [of(candidate) for candidate in advice.candidates],
        "notes": list(advice.notes),
    }
