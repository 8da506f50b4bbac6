"""What ``quantserve bench`` does."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import gmtime, strftime
from typing import Any, Final

from rich.console import Console
from rich.markup import escape

from quantserve.cli.output import console, print_json
from quantserve.cli.sources import choose_target, load_sources, outcomes
from quantserve.errors import QuantserveError, UsageError
from quantserve.planning.compose import Composition
from quantserve.planning.expectation import as_profile, expectation
from quantserve.planning.plan import refusal
from quantserve.plugins.registry import Registry
from quantserve.predict.workload import Workload
from quantserve.system.homes import temporary_folder
from quantserve_bench import markdown
from quantserve_bench.causes import OWN, with_fix
from quantserve_bench.display import Display, print_results
from quantserve_bench.load import Closed, Load, Rounds
from quantserve_bench.measured import Measured
from quantserve_bench.options import make_settings, pairs, split
from quantserve_bench.request import Target
from quantserve_bench.results import check_folder, write
from quantserve_bench.served import Served, choose_models, served_models
from quantserve_bench.server import Server, choose
from quantserve_bench.session import Expect, Measurement, Settings, measure_models
from quantserve_bench.verdicts import lowest

INTERRUPTED: Final = 130
OWN_SHARE: Final = 0.01
"""Share of requests that may fail in the client itself; above it the measurement fails."""


def bench(
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
    """Measure the models of a server or a config, and write the results.

    Args:
        sources: files or folders of configs, checkpoints; exclude `url`.
        configs: further ones.
        compare, names: the models to measure, with commas.
        together: serve all models at the same time.
        url: of a running server.
        api_key: of this server.
        out: folder of the results, None for one named after the time.
        overwrite: replace the results there.
        metadata: ``a=b,c=d`` for the result files.
        plots: draw them.
        fail_under: the least share of an expected value.
        as_json: print JSON.
        options: see `make_settings`.

    Returns:
        The exit code.
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
            failed = error  # keep the measurements completed so far
    values = write(out, done, settings, notes, plots=plots)
    if as_json:
        print_json(values)
    else:
        print_results(console(), done, out)
    if isinstance(failed, QuantserveError):
        raise failed
    if failed:
        err.print(f"interrupted; the completed measurements are in {out}")
        return INTERRUPTED
    return gate(err, done, fail_under)


def _check_subject(
    sources: Sequence[str], url: str | None, names: str | None, compare: str | None, together: bool
) -> None:
    if url and sources:
        raise UsageError(
            "--url (a running server) and CONFIG (a server to start) exclude each other\n  fix: give one of them"
        )
    if not url and not sources:
        raise UsageError("nothing to measure\n  fix: give a running server with --url, or a CONFIG to serve")
    for source in sources:
        if source.startswith(("http://", "https://")):
            raise UsageError(f"{source} is the address of a server, not a CONFIG\n  fix: use --url {source}")
    if names and not url:
        raise UsageError(
            "--model selects models of a server at --url\n  fix: use --compare to select models of a CONFIG"
        )
    if (compare or together) and url:
        raise UsageError(
            "--compare and --together need a CONFIG, not --url\n  fix: use --model to select models of the server"
        )


def _measure_own(
    sources: Sequence[str],
    names: Sequence[str],
    together: bool,
    settings: Settings,
    display: Display,
    done: list[Measurement],
) -> None:
    """Serve the models of a config, one after the other or together, and measure them."""
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
    """The expected performance of served models: published numbers if there are any, else a prediction for the load."""

    def expect(served: Served, load: Load, measured: Measured) -> Mapping[str, Any] | None:
        composition = compositions.get(served.id)
        published = (served.expected or {}).get("source") == "reference"
        if composition is None or published or not isinstance(load, Closed | Rounds):
            return served.expected
        return predicted(composition, load, measured) or served.expected

    return expect


def predicted(composition: Composition, load: Closed | Rounds, measured: Measured) -> dict[str, Any] | None:
    """A prediction for the measured concurrency and token counts; None if none is possible."""
    plugin, model = composition.method_plugin, composition.model
    if plugin is None:
        return None
    setting = composition.engine_kwargs.get("quantization")
    made = expectation(
        plugin,
        composition.checkpoint,
        model,
        composition.target,
        composition.memory,
        argument=setting.value if setting else None,
        environment=composition.environment,
        stored=composition.stored,
    )
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
    """Exit code: 1 if a measurement is void (`_void`), or with a limit if a metric is below it or a request failed."""
    problems = [problem for m in measurements if (problem := _void(m))]
    if fail_under is not None:
        problems += [problem for m in measurements if (problem := _below(m, fail_under))]
    for problem in dict.fromkeys(problems):
        err.print(f"[red]failed[/] {escape(problem)}", soft_wrap=True)
    return 1 if problems else 0


def _void(measurement: Measurement) -> str | None:
    """Why the figures mean nothing: no answer, no token, or requests that this machine itself made fail."""
    name, measured = f"{measurement.served.id}, {measurement.load_label}", measurement.measured
    sent = int(measured.totals["requests"])
    own = {code: count for code, count in measured.error_codes.items() if code in OWN}
    if sum(own.values()) > OWN_SHARE * sent:
        code = max(own, key=lambda code: own[code])
        message = f"{name}: {sum(own.values())} of {sent} requests failed in this client, not in the server: "
        return with_fix(message + measured.error_messages[code], code)
    if not measured.timings:
        return f"{name}: no request got a complete answer"
    if not any(timing.output_tokens for timing in measured.timings):
        return f"{name}: no request got an output token"
    return None


def _below(measurement: Measurement, limit: float) -> str | None:
    name = f"{measurement.served.id}, {measurement.load_label}"
    if errors := int(measurement.measured.totals["errors"]):
        return f"{name}: {errors} requests failed"
    worst = lowest(measurement.verdicts)
    if worst is None:
        return f"{name}: --fail-under needs an expected performance, and the server reports none"
    if worst.score < limit:
        return (
            f"{name}: {worst.key} is {markdown.number(worst.measured)}, expected {markdown.number(worst.expected)}: "
            f"ratio {worst.score:.2f}, below --fail-under {limit:g}"
        )
    return None
