"""The command line: `python -m benchmarks.kernels`."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import benchmarks.kernels as package
from benchmarks import program, report
from benchmarks.console import BUILD, BenchError, say
from benchmarks.decode.__main__ import numbers
from benchmarks.decode.pool import choose_cores
from benchmarks.kernels import formats, host, plots, results, shapes, tables, workers

CACHES = 4  # times the cache that the copies of a weight exceed
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 512)
NORMAL = {"rounds": 9, "seconds": 2.0, "batches": BATCHES}
SHORT = {"rounds": 7, "seconds": 0.0, "batches": (1, 8, 64)}
QUICK_SHAPE = shapes.Shape("7b", "o", 4096, 4096)


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=(package.__doc__ or "").partition("\n")[0]
    )
    out.add_argument("--models", default="7b", metavar="7b,13b,70b,narrow", help="of Llama-2, or all; default 7b")
    out.add_argument("--formats", metavar="A,B", help="or all; an unknown name lists them")
    out.add_argument("--batches", type=numbers, metavar="1,8,64", help="default 1 to 128 by doubling, and 512")
    out.add_argument("--threads", type=numbers, default=(1,), metavar="1,2", help="compute threads; default 1")
    out.add_argument("--rounds", type=int, help="at least; default 9")
    out.add_argument("--seconds", type=float, help="go on with rounds, up to 48, for so long per cell; default 2")
    out.add_argument(
        "--quick", action="store_true", help="one shape, three batch sizes, few rounds: to see that all runs"
    )
    out.add_argument("--render", action="store_true", help="measure nothing: draw OUT/results.json anew")
    out.add_argument("--out", type=Path, default=BUILD / "kernels", help="default build/bench/kernels")
    return out


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What to measure, as the workers get it.

    Raises:
        BenchError: an unknown name or a number out of range; says what is known.
    """
    chosen = SHORT if options.quick else NORMAL
    given = {key: getattr(options, key) for key in chosen if getattr(options, key) is not None}
    linears = [QUICK_SHAPE] if options.quick else shapes.choose(options.models)
    out = {
        **chosen,
        **given,
        "shapes": [dataclasses.asdict(shape) for shape in linears],
        "formats": formats.choose(options.formats),
    }
    if out["rounds"] < 1 or out["seconds"] < 0:
        raise BenchError("--rounds is 1 or more, --seconds 0 or more")
    for threads in options.threads:
        choose_cores(threads)
    return out


def benchmark(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure; returns what results.json holds, which is written after every cell."""
    settings = settings_of(options)
    load = host.load()
    if load > 0.5:
        say(f"WARNING: {load:.1f} cores were busy in the last minute; the figures are only as good as the quiet")
    if not report.can_plot():
        say(f"there will be tables but no plots: {report.PLOT_FIX}")
    found: dict[str, Any] = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": report.machine(),
        "load": round(load, 2),
        "cache_bytes": host.last_level_cache(),
        "caches": CACHES,
        "formats": settings["formats"],
        "errors": [],
        "runs": [],
    }

    def save() -> None:
        program.write(options.out / "results.json", json.dumps(found) + "\n")

    wanted = settings["formats"] if options.formats or options.quick else formats.choose("all")
    say(f"errors of {len(wanted)} formats")
    for piece in workers.ask({"do": "accuracy", "threads": max(options.threads), "formats": wanted}):
        found["errors"] += piece.get("errors", [])
    save()
    for threads in options.threads:
        measure(threads, settings, found, save)
    return found


def measure(threads: int, settings: dict[str, Any], found: dict[str, Any], save: Callable[[], None]) -> None:
    """All cells on so many threads, into `found`."""
    run: dict[str, Any] = {"threads": threads, "cells": [], "isa_cells": [], "refused": {}, "quiet": None}
    for piece in workers.ask({"do": "speed", "threads": threads, "caches": CACHES, **settings}):
        kind = piece.pop("kind")
        if kind == "started":
            run.update(piece)
            found["runs"].append(run)
            bandwidth = piece["bandwidth"]
            speed = bandwidth["candidates"][bandwidth["method"]]
            say(f"{tables.words(run)}: reads {speed:.1f} GB/s ({bandwidth['method']}); ours is {piece['isas'][-1]}")
            if piece["missing"]:
                say(f"without vLLM's operators: {piece['missing']}")
        elif kind == "refused":
            title = str(shapes.Shape(**piece["shape"]))
            run["refused"][title] = piece["reason"]
            say(f"{title} is left out: {piece['reason']}")
        elif kind in ("cell", "isa_cell"):
            run[f"{kind}s"].append(piece)
            if kind == "cell":
                say(progress(run, piece, settings["formats"]))
            save()
        else:
            run.update(piece)
            save()
            for reason in results.doubts(run):
                say(f"WARNING: {tables.words(run)}: {reason}")


def progress(run: dict[str, Any], cell: dict[str, Any], names: Sequence[str]) -> str:
    """One line about a cell."""
    others = (results.VLLM_BF16, results.VLLM_AWQ, *names)
    ratios = {name: results.speedup(cell, name, results.TORCH) for name in others}
    said = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items() if ratio is not None)
    where = f"{tables.words(run)}, {shapes.Shape(**cell['shape'])}, batch {cell['batch']}"
    return f"{where}: torch bf16 {1e3 * results.seconds(cell, results.TORCH):.3g} ms; {said}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns an exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.kernels", *arguments])
    return program.run(
        "kernels",
        options,
        lambda: benchmark(options, command),
        tables.markdown,
        plots.draw,
        "finished cells are in results.json",
    )


if __name__ == "__main__":
    sys.exit(main())
