"""``quantserve recommend``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from quantserve.cli.estimates import (
    MOST_USERS,
    advice_for,
    candidate_json,
    devices,
    number,
    source_of,
    weights,
    within,
)
from quantserve.cli.output import console, print_json, table, target_label, write_file
from quantserve.cli.profile_command import print_notes, print_refusals
from quantserve.cli.sources import choose_target
from quantserve.cli.svg import Line, chart
from quantserve.errors import FindingsError, UsageError
from quantserve.planning.advise import (
    ORDERS,
    Advice,
    Candidate,
    Ranked,
    Stretch,
    capacity,
    concurrencies,
    leaders,
    ranked,
    within_loss,
)
from quantserve.plugins.registry import how_to_install
from quantserve.predict.workload import Workload, find_workload

COLUMNS = (
    "",
    "Method",
    "tok/s\n/device",
    "E2E\nms",
    "TTFT\nms",
    "TPOT\nms",
    "within",
    "weights",
    "KV cache",
    "perplexity",
)


@click.command("recommend")
@click.argument("source", metavar="MODEL")
@click.option("--target", "target_name", metavar="NAME",
              help="Hardware, e.g. l4, 4xa100-80g, cpu; default: this machine.")  # fmt: skip
@click.option("--workload", "workload_name", default="chat", show_default=True,
              help="Workload: a name, or IN/OUT/CONCURRENCY (tokens, tokens, clients).")  # fmt: skip
@click.option("--method", "methods", multiple=True, metavar="METHOD", help="Only this method; may be repeated.")
@click.option("--by", "order", type=click.Choice(ORDERS), default="throughput", show_default=True,
              help="What to rank the methods by.")  # fmt: skip
@click.option("--max-loss", type=click.FloatRange(0, 1000), metavar="PERCENT",
              help="Only methods with a perplexity at most so much above the 16-bit model's.")  # fmt: skip
@click.option("--most", type=click.IntRange(1, MOST_USERS), default=256, show_default=True,
              help="Largest number of concurrent clients to compare.")  # fmt: skip
@click.option("--tensor-parallel-size", "ranks", type=click.IntRange(1, 64),
              help="Tensor parallel size; default: the smallest that fits.")  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw throughput over clients (SVG).")
@click.option("--write", "config", type=click.Path(path_type=Path, dir_okay=False), help="Write a model config (YAML).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    source: str,
    target_name: str | None,
    workload_name: str,
    methods: tuple[str, ...],
    order: str,
    max_loss: float | None,
    most: int,
    ranks: int | None,
    plot: Path | None,
    config: Path | None,
    as_json: bool,
) -> int:
    """Rank the quantization methods for MODEL on a target and a workload.

    MODEL is a folder (a bare config.json is enough), a hub id or a model file. Workloads: rayllm-2023, llmperf, chat,
    rag, batch, single. Exits 1 when nothing fits.
    """
    target = choose_target(target_name)
    workload = find_workload(workload_name)
    for path in (plot, config):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{path}: the folder {path.parent} does not exist\n  fix: create it, or give another path")
    if config is not None and config.exists():
        raise UsageError(f"{config} exists already\n  fix: name a new file")
    advice = advice_for(source, target, methods, ranks)
    if max_loss is not None:
        advice = within_loss(advice, max_loss / 100)
    order_of = ranked(advice, workload, order)
    if not order_of:
        if any(candidate.failure for candidate in advice.candidates) and advice.exit_code:
            raise next(candidate.failure for candidate in advice.candidates if candidate.failure)
        lines = [f"{c.label}: {c.failed or c.refusal or 'its plugin describes no kernel'}" for c in advice.candidates]
        raise FindingsError(
            f"no installed method can serve {advice.model.model_id} on {target}\n  " + "\n  ".join(lines), {}
        )
    changes = leaders(advice, workload, most)
    if plot is not None:
        write_file(plot, plotted(advice, workload, most, changes))
    written = write_config(config, order_of, workload, advice) if config is not None else ""
    if as_json:
        print_json(_as_json(advice, workload, order, order_of, changes))
        return advice.exit_code
    out = console()
    print_ranking(out, advice, workload, order, order_of)
    print_leaders(out, changes)
    print_refusals(out, advice)
    for name in advice.installable:
        out.print(f"  [yellow]{name}[/] is not installed: {escape(how_to_install(name))}")
    print_notes(out, advice)
    if plot is not None:
        out.print(f"drew {escape(str(plot))}")
    if written:
        out.print(written)
    return advice.exit_code


def print_ranking(out: Console, advice: Advice, workload: Workload, order: str, order_of: Sequence[Ranked]) -> None:
    """The table, best first, the best of each column in bold."""
    best = {
        "tok/s": max(order_of, key=lambda item: item.per_device),
        "E2E": min(order_of, key=lambda item: item.prediction.e2e_ms),
        "TTFT": min(order_of, key=lambda item: item.prediction.ttft_ms),
        "TPOT": min(order_of, key=lambda item: item.prediction.tpot_ms),
    }

    def cell(name: str, item: Ranked, value: float) -> str:
        return f"[bold]{number(value)}[/]" if best[name] is item else number(value)

    rows: list[Sequence[str]] = []
    for place, item in enumerate(order_of, 1):
        candidate, prediction = item.candidate, item.prediction
        on = f" on {devices(candidate, advice.target)}" if candidate.ranks > 1 else ""
        rows.append(
            (
                str(place),
                escape(candidate.label + on) + (" [dim](these files)[/]" if candidate.in_files else ""),
                cell("tok/s", item, item.per_device),
                cell("E2E", item, prediction.e2e_ms),
                cell("TTFT", item, prediction.ttft_ms),
                cell("TPOT", item, prediction.tpot_ms),
                within(prediction),
                weights(candidate),
                capacity(candidate.memory),
                quality(candidate),
            )
        )
    for candidate in advice.candidates:
        if candidate.failed:
            rows.append(("-", escape(candidate.label), *["-"] * 7, "[red]failed, see below[/]"))
    title = escape(f"{advice.model.model_id} on {target_label(advice.target)}, by {order}: {workload}")
    out.print(table(title, COLUMNS, rows, wrap=("Method", "weights", "KV cache", "perplexity")))
    first = order_of[0]
    out.print(
        f"  tok/s are of the server, divided by its devices; predicted from: {source_of(first.prediction, advice)}"
    )
    least = first.prediction.band(first.per_device)[0]
    close = [i.candidate.label for i in order_of[1:] if i.prediction.band(i.per_device)[1] > least]
    if close and order == "throughput":
        out.print(f"  not certain: the band of the first overlaps with {escape(', '.join(close))}")
    for note in sorted({note for item in order_of if (note := source_of_quality(item.candidate))}):
        out.print(f"  [dim]quality, {escape(note)}[/]", soft_wrap=True)
    out.print()


def quality(candidate: Candidate) -> str:
    """The rise of perplexity, measured or published."""
    if candidate.measured:
        return f"{candidate.measured.increase:+.1%} measured"
    if candidate.bits >= 16:
        return "as it is"
    return f"{candidate.quality.increase:+.1%}" if candidate.quality else "unknown"


def source_of_quality(candidate: Candidate) -> str:
    """Where `quality` comes from; "" where it needs no word."""
    if candidate.measured:
        return f"{candidate.label}: measured of these files: {candidate.measured.measured_on}"
    if candidate.bits >= 16 or not candidate.quality:
        return ""
    return f"{candidate.label}: published for {candidate.quality.measured_on} ({candidate.quality.source})"


def print_leaders(out: Console, changes: Sequence[Stretch]) -> None:
    """Who leads at which number of clients."""
    spans = [
        f"{stretch.first} to {stretch.last} clients: [bold]{escape(stretch.label)}[/]"
        if stretch.last > stretch.first
        else f"{stretch.first} client{'s' if stretch.first > 1 else ''}: [bold]{escape(stretch.label)}[/]"
        for stretch in changes
    ]
    out.print("  most tokens per second and device, " + "; ".join(spans))


def plotted(advice: Advice, workload: Workload, most: int, changes: Sequence[Stretch]) -> str:
    """Throughput by clients of every method that can be served."""
    lines = []
    for candidate in advice.candidates:
        points = []
        for users in concurrencies(most):
            if prediction := candidate.predict(workload.at(users)):
                rate = prediction.tokens_per_s / candidate.ranks
                points.append((users, rate, *prediction.band(rate)))
        if points:
            lines.append(Line(candidate.label, points))
    marks = [stretch.first for stretch in changes[1:]]
    title = f"{advice.model.model_id} on {advice.target}: {workload.input_tokens} in, {workload.output_tokens} out"
    return chart(title, "clients", "output tokens per second and device, predicted", lines, marks)


def write_config(path: Path, order_of: Sequence[Ranked], workload: Workload, advice: Advice) -> str:
    """Write the config of the best method these files can be served with; gives what to say about it.

    Without weights it is the best method of all, and says that they are missing.
    """
    import yaml

    has_files = bool(advice.checkpoint.tensors)
    usable = [item for item in order_of if item.candidate.in_files] if has_files else list(order_of)
    if not usable:
        raise UsageError(
            f"no config can be written: {advice.model.source} holds files of a method that cannot be served on "
            f"{advice.target}"
        )
    chosen, best = usable[0], order_of[0]
    candidate = chosen.candidate
    engine: dict[str, Any] = {"model_id": advice.model.model_id}
    if advice.model.source != advice.model.model_id:
        engine["hf_model_id"] = advice.model.source
    if advice.model.revision:
        engine["revision"] = advice.model.revision
    kwargs = dict(advice.model.engine_kwargs)
    kwargs["quantization"] = candidate.method.name
    users = chosen.prediction.most_running
    kwargs.setdefault("max_num_seqs", max(16, 1 << (users - 1).bit_length()))
    longest = candidate.made.max_model_len if candidate.made else 0
    wanted = workload.input_tokens + workload.output_tokens
    if context := advice.model.max_model_len or (min(longest, max(4096, 2 * wanted)) if longest else 0):
        engine["max_total_tokens"] = context
    engine["engine_kwargs"] = kwargs
    on_cpu = advice.target.device == "cpu"
    config = {
        "engine_config": engine,
        "deployment_config": {"max_ongoing_requests": 2 * kwargs["max_num_seqs"]},
        "scaling_config": {"num_workers": candidate.ranks, "num_gpus_per_worker": 0 if on_cpu else 1},
    }
    p = chosen.prediction
    header = (
        f"# {candidate.label} for {advice.target}, chosen for {workload}\n"
        f"# Predicted ({p.source}, {within(p)}): TTFT {number(p.ttft_ms)} ms, TPOT {number(p.tpot_ms)} ms, "
        f"{number(p.tokens_per_s)} tok/s of the server\n"
    )
    write_file(path, header + yaml.safe_dump(config, sort_keys=False))
    said = [f"wrote {escape(str(path))}; next: quantserve check {escape(str(path))}"]
    if not has_files:
        said.append(f"  {escape(advice.model.source)} has no weights yet: first copy those of {candidate.label} there")
    elif chosen is not best:
        ratio = f"{best.prediction.tokens_per_s / p.tokens_per_s:.2f}x as fast"
        said.append(
            f"  the config serves the existing files ({escape(candidate.label)}); {escape(best.candidate.label)} would "
            f"be {ratio}, but needs another checkpoint"
        )
    return "\n".join(said)


def _as_json(
    advice: Advice, workload: Workload, order: str, order_of: Sequence[Ranked], changes: Sequence[Stretch]
) -> dict[str, object]:
    places = {item.candidate.key: place for place, item in enumerate(order_of, 1)}
    predictions = {item.candidate.key: item.prediction for item in order_of}
    return {
        "model_id": advice.model.model_id,
        "target": advice.target.to_json(),
        "workload": workload.to_json(),
        "by": order,
        "methods": [
            {
                **candidate_json(candidate),
                "place": places.get(candidate.key),
                "predicted": predictions[candidate.key].to_json() if candidate.key in predictions else None,
            }
            for candidate in sorted(advice.candidates, key=lambda c: places.get(c.key, 1 << 30))
        ],
        "most_tokens_per_s": [
            {"from": stretch.first, "to": stretch.last, "method": stretch.label} for stretch in changes
        ],
        "installable": {name: how_to_install(name) for name in advice.installable},
        "notes": list(advice.notes),
    }
