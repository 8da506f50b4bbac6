"""The command line: `python -m benchmarks.decode`."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchmarks.decode as package
from benchmarks import program, report
from benchmarks.console import BUILD, BenchError, say
from benchmarks.decode import measure, results
from benchmarks.decode.pool import choose_cores
from benchmarks.decode.shapes import FULL, QUICK, size
from benchmarks.decode.variants import Variant, choose

NORMAL = {"rounds": 5, "load_rounds": 3, "prompts": (64, 128, 512), "batches": (1, 4, 16), "steps": 48}
SHORT = {"rounds": 2, "load_rounds": 0, "prompts": (64,), "batches": (1, 4), "steps": 8}


def numbers(text: str) -> tuple[int, ...]:
    """A comma list of positive whole numbers."""
    values = tuple(int(part) for part in text.split(","))
    if min(values) < 1:
        raise ValueError(text)
    return values


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description=(package.__doc__ or "").partition("\n")[0]
    )
    out.add_argument("--variants", metavar="A,B", help="`all`, or by default some; an unknown name lists them")
    out.add_argument("--threads", type=numbers, default=(1,), metavar="1,2", help="compute threads; default 1")
    out.add_argument("--batches", type=numbers, metavar="1,4,16", help="sequences that decode together, at most 16")
    out.add_argument("--prompts", type=numbers, metavar="64,128,512", help="prompt lengths of the prefill, in tokens")
    out.add_argument("--rounds", type=int, help="default 5")
    out.add_argument("--load-rounds", type=int, help="separate starts to measure loading; default 3, 0 for none")
    out.add_argument("--steps", type=int, help="decode steps at most; default 48")
    out.add_argument("--seconds", type=float, default=6.0, help="decode at most so long per cell; default 6")
    out.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    out.add_argument(
        "--quick", action="store_true", help="a tiny shape, to see that all runs; the figures mean nothing"
    )
    out.add_argument(
        "--render", action="store_true", help="measure nothing: draw table and plot of OUT/results.json anew"
    )
    out.add_argument("--out", type=Path, default=BUILD / "decode", help="default build/bench/decode")
    return out


def settings_of(options: argparse.Namespace) -> measure.Settings:
    """What to measure.

    Raises:
        BenchError: a number out of range.
    """
    chosen = SHORT if options.quick else NORMAL
    given = {key: getattr(options, key) for key in chosen if getattr(options, key) is not None}
    settings = measure.Settings(
        shape=QUICK if options.quick else FULL,
        seconds=options.seconds,
        eager=options.eager or options.quick,
        may_build=not options.quick,
        **{**chosen, **given},
    )
    if max(settings.batches) > 16 or max(settings.prompts) > 1000:
        raise BenchError("batches go up to 16 and prompts to 1000 tokens")
    if settings.rounds < 1 or settings.load_rounds < 0 or settings.steps < 1:
        raise BenchError("--rounds and --steps are 1 or more, --load-rounds 0 or more")
    return settings


def benchmark(options: argparse.Namespace, variants: Sequence[Variant], command: str) -> dict[str, Any]:
    """Measure; returns and, after every round, writes what results.json holds."""
    settings = settings_of(options)
    for threads in options.threads:
        choose_cores(threads)
    if (load := measure.other_load()) > 0.5:
        say(f"WARNING: {load:.1f} cores were busy in the last minute; the figures are only as good as the quiet")
    if not report.can_plot():
        say(f"there will be a table but no plot: {report.PLOT_FIX}")
    errors: dict[str, str] = {}
    peer = measure.prepare(variants, settings, errors)
    shape = settings.shape
    out: dict[str, Any] = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": report.machine(),
        "peer": peer,
        "shape": {
            **dataclasses.asdict(shape),
            "parameters": shape.parameters,
            "linear_parameters": shape.linear_parameters,
        },
        "eager": settings.eager,
        "variants": {variant.name: variant.about for variant in variants},
        "checkpoint_bytes": {
            variant.name: size(shape.checkpoint(variant.checkpoint))
            for variant in variants
            if variant.name not in errors
        },
        "loads": {},
        "runs": [],
    }
    cores = choose_cores(options.threads[0])
    out["loads"] = measure.measure_loading(variants, settings, cores, errors)
    finished: list[dict[str, Any]] = []
    for threads in options.threads:

        def save(run: dict[str, Any], before: Sequence[dict[str, Any]] = tuple(finished)) -> None:
            program.write(options.out / "results.json", json.dumps({**out, "runs": [*before, run]}, indent=2) + "\n")

        finished.append(measure.run(threads, variants, settings, dict(errors), save))
    return {**out, "runs": finished}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns an exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.decode", *arguments])

    def measured() -> dict[str, Any]:
        found = benchmark(options, choose(options.variants), command)
        program.write(options.out / "results.json", json.dumps(found, indent=2) + "\n")
        return found

    kept = "all engines are ended; finished rounds are in results.json"
    return program.run("decode", options, measured, results.markdown, results.plot, kept)


if __name__ == "__main__":
    sys.exit(main())
