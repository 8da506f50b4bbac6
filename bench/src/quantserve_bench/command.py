"""The options of ``quantserve bench``; what it does is in `program`, as ``quantserve list`` imports this module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from quantserve_bench.prompts import Lengths

WARMUP: Final = 10


class Commas(click.ParamType[Any]):
    """A comma-separated list of numbers above 0."""

    def __init__(self, number: type[int] | type[float]) -> None:
        self.name = "A,B,..."
        self._number = number

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Parse it."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self._number(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(0 < number < float("inf") for number in numbers):
            kind = "whole numbers" if self._number is int else "numbers"
            self.fail(f"{value!r} is not a comma-separated list of {kind} above 0, like 1,4,16", param, ctx)
        return numbers


class LengthType(click.ParamType[Any]):
    """``MEAN`` or ``MEAN/SD`` in tokens."""

    name = "MEAN[/SD]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Lengths:
        """Parse it."""
        from quantserve_bench.prompts import Lengths

        if isinstance(value, Lengths):
            return value
        mean, _, deviation = str(value).partition("/")
        try:
            lengths = Lengths(float(mean), float(deviation or 0))
        except ValueError:
            lengths = Lengths(0)
        if not (1 <= lengths.mean < 1e7 and 0 <= lengths.stddev < 1e7):
            self.fail(f"{value!r} is not MEAN or MEAN/SD in tokens, like 512 or 550/150", param, ctx)
        return lengths


@click.command("bench")
@click.argument("sources", nargs=-1, metavar="[CONFIG|MODEL]...")
@click.option("--config", "configs", multiple=True, metavar="FILE", help="Same as the CONFIG argument.")
@click.option(
    "--compare", metavar="A,B", help="Measure only these models of the config, by method or id, in this order."
)
@click.option("--together", is_flag=True, help="Serve all models at the same time; default: one after the other.")
@click.option("--url", metavar="URL", help="Measure a running server at this address.")
@click.option("--model", "names", metavar="A,B", help="Models of the server at --url; default: all.")
@click.option(
    "--api-key", envvar="QUANTSERVE_API_KEY", metavar="KEY", help="API key of the server; or set QUANTSERVE_API_KEY."
)
@click.option("--workload", "workload_name", default="llmperf", show_default=True, metavar="NAME",
              help="Workload: rayllm-2023, llmperf, random, sonnet, trace.")  # fmt: skip
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE", help="Trace file to replay, in JSON lines.")
@click.option(
    "--trace-unit",
    type=click.Choice(["s", "ms"]),
    default="s",
    show_default=True,
    help="Unit of the trace's timestamps.",
)
@click.option(
    "-n", "--requests", "count", type=click.IntRange(min=1), help="Number of requests; default: that of the workload."
)
@click.option(
    "-c",
    "--concurrency",
    type=Commas(int),
    help="Number of concurrent users; several numbers are measured one after the other.",
)
@click.option(
    "--rounds/--no-rounds",
    default=None,
    help="Send requests in groups; a group starts when all answers of the previous one are complete.",
)
@click.option("--rate", type=Commas(float), help="Open load: requests per second, independent of the answers.")
@click.option("--rate-end", type=click.FloatRange(min=0), metavar="R", help="Open load: rate at the end of --ramp.")
@click.option("--ramp", type=click.FloatRange(min=0), default=0.0, metavar="S",
              help="Seconds until --rate-end is reached, or until all users have started.")  # fmt: skip
@click.option("--arrival", type=click.Choice(["poisson", "constant"]), default="poisson", show_default=True,
              help="Distribution of the arrivals of an open load.")  # fmt: skip
@click.option(
    "--max-concurrency",
    type=click.IntRange(min=1),
    help="Open load: most requests in flight; further ones wait in the client.",
)
@click.option("--input-tokens", type=LengthType(), help="Prompt length in tokens.")
@click.option("--output-tokens", type=LengthType(), help="Answer length in tokens.")
@click.option(
    "--prefix-tokens",
    type=click.IntRange(min=0),
    help="Length in tokens of the common prefix of all prompts (workload sonnet).",
)
@click.option("--scale", type=click.FloatRange(min=0.001), metavar="F", help="Factor on all lengths of the workload.")
@click.option("--ignore-eos/--respect-eos", default=None, help="Generate answers of exactly the requested length.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), help="Sampling temperature; default: that of the workload."
)
@click.option("--extra", metavar="JSON", help="Further fields of every request, as a JSON object.")
@click.option(
    "--tokenizer", metavar="FILE", help="tokenizer.json that counts prompt tokens; default: the server's /tokenize."
)
@click.option(
    "--unique/--no-unique",
    default=True,
    show_default=True,
    help="Make every prompt unique, so that no prefix cache contains it.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed of prompts, lengths and arrivals.")
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=WARMUP,
    show_default=True,
    help="Warm-up requests before each measurement.",
)
@click.option(
    "--max-duration",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="Stop sending after this many seconds.",
)
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=600.0, show_default=True, metavar="S",
              help="Request timeout in seconds.")  # fmt: skip
@click.option(
    "--stall",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="A request fails if no data arrives for this many seconds.",
)
@click.option("--slo", metavar="K=MS,...", help="Limits in ms for goodput: ttft, tpot, e2e, normalized.")
@click.option("--metadata", metavar="K=V,...", help="Metadata for the result files.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the results; default: bench-results/TIME-WORKLOAD.",
)
@click.option("--overwrite", is_flag=True, help="Replace the results in --out.")
@click.option("--plots/--no-plots", default=True, help="Draw plots, if matplotlib is installed.")
@click.option("--fail-under", type=click.FloatRange(min=0, min_open=True), metavar="RATIO",
              help="Exit 1 if a metric is below this share of the expected value, or if requests fail.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(**options: Any) -> int:
    """Measure models under load: a server at --url, or a CONFIG, which is served during the benchmark.

    Prints the means per request and the expected performance, and writes tables, plots, CSV and JSON to --out. Every
    metric is written with its definition.
    """
    from quantserve_bench.program import bench

    return bench(**options)
