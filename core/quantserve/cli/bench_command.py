"""``quantserve bench``."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import gmtime, strftime
from typing import Any, Final

import click
from rich.console import Console
from rich.markup import escape

from quantserve.bench import markdown
from quantserve.bench.load import Closed, Load, Rounds
from quantserve.bench.measured import SLO_KEYS, Measured
from quantserve.bench.request import Target
from quantserve.bench.results import check_folder, write
from quantserve.bench.served import Served, choose_models, served_models
from quantserve.bench.server import Server, choose
from quantserve.bench.session import Expect, Measurement, Settings, measure_models
from quantserve.bench.verdicts import lowest
from quantserve.bench.workloads import WORKLOADS
from quantserve.cli.bench_display import Display, print_results
from quantserve.cli.bench_options import Commas, LengthType, make_settings, pairs, split
from quantserve.cli.output import console, print_json
from quantserve.cli.sources import choose_target, load_sources, outcomes
from quantserve.compose import Composition
from quantserve.errors import QuantserveError, UsageError
from quantserve.expectation import as_profile, expectation
from quantserve.homes import temporary_folder
from quantserve.performance import Workload
from quantserve.plan import refusal
from quantserve.registry import Registry

INTERRUPTED: Final = 130
WARMUP: Final = 10


@click.command("bench")
@click.argument("sources", nargs=-1, metavar="[CONFIG|MODEL]...")
@click.option("--config", "configs", multiple=True, metavar="FILE", help="The same as CONFIG.")
@click.option("--compare", metavar="A,B", help="Of the config's models only these, by method or id, in this order.")
@click.option("--together", is_flag=True, help="Start all models at once; default: one after another.")
@click.option("--url", metavar="URL", help="Measure a server that runs already.")
@click.option("--model", "names", metavar="A,B", help="Models of the server at --url; default: all.")
@click.option("--api-key", envvar="QUANTSERVE_API_KEY", metavar="KEY", help="Key of the server, or QUANTSERVE_API_KEY.")
@click.option("--workload", "workload_name", default="llmperf", show_default=True, metavar="NAME",
              help=f"One of {', '.join(WORKLOADS)}.")  # fmt: skip
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE", help="Trace to replay, as JSON lines.")
@click.option("--trace-unit", type=click.Choice(["s", "ms"]), default="s", show_default=True, help="Of its timestamps.")
@click.option("-n", "--requests", "count", type=click.IntRange(min=1), help="Requests; default: the workload's.")
@click.option("-c", "--concurrency", type=Commas(int), help="Users; several numbers are measured one by one.")
@click.option("--rounds/--no-rounds", default=None, help="Send in groups, each when the last was answered whole.")
@click.option("--rate", type=Commas(float), help="Open load: requests per second, whatever was answered.")
@click.option("--rate-end", type=click.FloatRange(min=0), metavar="R", help="Rate that --rate becomes over --ramp.")
@click.option("--ramp", type=click.FloatRange(min=0), default=0.0, metavar="S",
              help="Seconds until --rate-end, or until all users have joined.")  # fmt: skip
@click.option("--arrival", type=click.Choice(["poisson", "constant"]), default="poisson", show_default=True,
              help="Of an open load.")  # fmt: skip
@click.option("--max-concurrency", type=click.IntRange(min=1), help="Open load: further requests wait in the client.")
@click.option("--input-tokens", type=LengthType(), help="Prompt length.")
@click.option("--output-tokens", type=LengthType(), help="Answer length.")
@click.option("--prefix-tokens", type=click.IntRange(min=0), help="Beginning that all prompts of sonnet share.")
@click.option("--scale", type=click.FloatRange(min=0.001), metavar="F", help="All lengths of the workload times this.")
@click.option("--ignore-eos/--respect-eos", default=None, help="Answers of exactly the length asked for.")
@click.option("--temperature", type=click.FloatRange(min=0), help="Default: the workload's.")
@click.option("--extra", metavar="JSON", help="Further keys of every request.")
@click.option("--tokenizer", metavar="FILE", help="tokenizer.json for prompt lengths; default: the server's /tokenize.")
@click.option("--unique/--no-unique", default=True, show_default=True, help="Prompts that no prefix cache has seen.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of prompts, lengths and arrivals.")
@click.option("--warmup", type=click.IntRange(min=0), default=WARMUP, show_default=True, help="Requests beforehand.")
@click.option("--max-duration", type=click.FloatRange(min=0, min_open=True), metavar="S", help="Send nothing later.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=600.0, show_default=True, metavar="S",
              help="Of a request.")  # fmt: skip
@click.option("--stall", type=click.FloatRange(min=0, min_open=True), metavar="S", help="Longest silence in an answer.")
@click.option("--slo", metavar="K=MS,...", help=f"Limits for goodput, of {', '.join(SLO_KEYS)}.")
@click.option("--metadata", metavar="K=V,...", help="Kept in the result files.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Default: bench-results/TIME-WORKLOAD.")
@click.option("--overwrite", is_flag=True, help="Replace what is in --out.")
@click.option("--plots/--no-plots", default=True, help="Draw plots where matplotlib is installed.")
@click.option("--fail-under", type=click.FloatRange(min=0, min_open=True), metavar="RATIO",
              help="Exit 1 when a metric reaches less than this share of the expected, or requests fail.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    sources: tuple[str, ...],
    configs: tuple[str, ...],
    compare: str | None,
    together: bool,
    url: str | None,
    names: str | None,
    api_key: str | None,
    out: Path | None,
    overwrite: bool,
    metadata: str | None,
    plots: bool,
    fail_under: float | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Measure models under load: a server at --url, or CONFIG, started for the time of the benchmark.

    Prints means per request beside what is expected, and writes tables, plots, CSV and JSON to --out. Every metric is
    written with its definition.
    """
    sources = (*sources, *configs)
    _check_subject(sources, url, names, compare, together)
    settings = make_settings(**options)
    notes = pairs("--metadata", metadata)
    out = out or Path("bench-results") / f"{strftime('%Y%m%d-%H%M%S', gmtime())}-{settings.workload.name}"
    check_folder(out, overwrite)
    err = console(stderr=True)
    done: list[Measurement] = []
    failed: BaseException | None = None
    with Display(err) as display:
        try:
            if url:
                target = Target(url, "", api_key)
                models = choose_models(served_models(target), split(names))
                measure_models(target, models, settings, display.show, done=done)
            else:
                _measure_own(sources, split(compare), together, settings, display, done)
        except (QuantserveError, KeyboardInterrupt) as error:
            if not done:
                raise
            failed = error  # what was measured before is worth keeping
    values = write(out, done, settings, notes, plots=plots)
    if as_json:
        print_json(values)
    else:
        print_results(console(), done, out)
    if isinstance(failed, QuantserveError):
        raise failed
    if failed:
        err.print(f"interrupted; {out} holds what was complete")
        return INTERRUPTED
    return gate(err, done, fail_under)


def _check_subject(
    sources: Sequence[str], url: str | None, names: str | None, compare: str | None, together: bool
) -> None:
    if url and sources:
        raise UsageError("--url measures a server that runs, CONFIG one that is started\n  fix: give one of them")
    if not url and not sources:
        raise UsageError("nothing to measure\n  fix: name a server with --url, or a CONFIG to serve")
    for source in sources:
        if source.startswith(("http://", "https://")):
            raise UsageError(f"{source} is no CONFIG but a server\n  fix: --url {source}")
    if names and not url:
        raise UsageError("--model chooses models of --url\n  fix: choose models of a CONFIG with --compare")
    if (compare or together) and url:
        raise UsageError("--compare and --together are for a CONFIG\n  fix: choose models of --url with --model")


def _measure_own(
    sources: Sequence[str],
    names: Sequence[str],
    together: bool,
    settings: Settings,
    display: Display,
    done: list[Measurement],
) -> None:
    """Serve the models of a config, one after another or together, and measure them."""
    app = load_sources(sources, None, None, None, False)
    results = list(outcomes(app.models, Registry.load(), choose_target(None)))
    methods = {r.model.model_id: r.composition.method.name for r in results if r.composition and r.composition.method}
    chosen = choose(app.models, names, methods)
    for result in results:
        if result.model in chosen and result.error:
            raise result.error
    refused = {r.model.model_id: list(r.composition.errors) for r in results if r.model in chosen and r.composition}
    if any(refused.values()):
        raise refusal({model: findings for model, findings in refused.items() if findings})
    expect = expected_of({r.model.model_id: r.composition for r in results if r.composition})
    groups = [chosen] if together else [[model] for model in chosen]
    for group in groups:
        with tempfile.TemporaryDirectory(prefix="quantserve-bench-", dir=temporary_folder()) as folder:
            label = ", ".join(model.model_id for model in group)
            with Server(group, Path(folder), display.waiting(label)) as target:
                display.started(label)
                ids = [model.model_id for model in group]
                models = choose_models(served_models(target), ids)
                measure_models(target, models, settings, display.show, expect, done)


def expected_of(compositions: Mapping[str, Composition]) -> Expect:
    """What to expect of our own models: numbers published of exactly this, else a prediction for what was measured."""

    def expect(served: Served, load: Load, measured: Measured) -> Mapping[str, Any] | None:
        composition = compositions.get(served.id)
        published = (served.expected or {}).get("source") == "reference"
        if composition is None or published or not isinstance(load, Closed | Rounds):
            return served.expected
        return predicted(composition, load, measured) or served.expected

    return expect


def predicted(composition: Composition, load: Closed | Rounds, measured: Measured) -> dict[str, Any] | None:
    """A prediction for the concurrency and the token counts that were measured; None when nothing can be predicted."""
    plugin, model = composition.method_plugin, composition.model
    if plugin is None:
        return None
    made = expectation(plugin, composition.checkpoint, model, composition.target, composition.memory)
    if made is None:
        return None
    tokens_in, tokens_out = (measured.summaries[key] for key in ("input_tokens", "output_tokens"))
    workload = Workload(
        "measured",
        max(1, round(tokens_in.mean)),
        max(1, round(tokens_out.mean)),
        load.concurrency,
        rounds=isinstance(load, Rounds),
        known=tuple((one.input_tokens or round(tokens_in.mean), max(1, one.output_tokens)) for one in measured.timings),
    )
    prediction = made.predict(workload)
    profile = as_profile(made, prediction, composition.target).to_json()
    return {**profile, "tpot_ms": prediction.tpot_ms, "all_users_tokens_per_s": prediction.tokens_per_s}


def gate(err: Console, measurements: Sequence[Measurement], fail_under: float | None) -> int:
    """1 when nothing was answered, or with a limit: when a metric stays below it or requests failed; else 0."""
    problems = [
        f"{m.served.id}, {m.load_label}: no request was answered" for m in measurements if not m.measured.timings
    ]
    if fail_under is not None:
        problems += [problem for m in measurements if (problem := _below(m, fail_under))]
    for problem in dict.fromkeys(problems):
        err.print(f"[red]failed[/] {escape(problem)}", soft_wrap=True)
    return 1 if problems else 0


def _below(measurement: Measurement, limit: float) -> str | None:
    name = f"{measurement.served.id}, {measurement.load_label}"
    if errors := int(measurement.measured.totals["errors"]):
        return f"{name}: {errors} requests failed"
    worst = lowest(measurement.verdicts)
    if worst is None:
        return f"{name}: the server names no expected performance, so there is nothing to compare with"
    if worst.score < limit:
        return (
            f"{name}: {worst.key} is {markdown.number(worst.measured)}, expected {markdown.number(worst.expected)}: "
            f"{worst.score:.2f} of it, and --fail-under is {limit:g}"
        )
    return None
