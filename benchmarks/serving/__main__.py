"""The command line: `python -m benchmarks.serving`."""

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

import benchmarks.serving as package
from benchmarks import program, report
from benchmarks.console import BenchError, say
from benchmarks.serving import results
from benchmarks.serving.cells import APIS, LENGTHS, PATHS, REFERENCE, USERS, Choice, chosen
from benchmarks.serving.measure import Bench, Found
from benchmarks.serving.models import SERVING
from benchmarks.serving.processes import busy_cores

SHAPES = ("demo", "small")
QUICK: dict[str, Any] = {
    "paths": "one,route,shared,ray-default",
    "shapes": "demo",
    "users": "16",
    "lengths": "64/64",
    "rounds": 1,
    "starts": 0,
}
FULL: dict[str, Any] = {"paths": None, "shapes": None, "users": None, "lengths": None, "rounds": 3, "starts": 1}


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=(package.__doc__ or "").partition("\n")[0]
    )
    out.add_argument("--paths", metavar="A,B", help=f"of {', '.join(PATHS)}; {REFERENCE} always takes part")
    out.add_argument("--shapes", metavar="A,B", help=f"of {', '.join(SHAPES)}")
    out.add_argument("--concurrency", dest="users", metavar="1,16,64", help="requests at once")
    out.add_argument("--lengths", metavar="64/64,512/128", help="tokens in and out")
    out.add_argument("--apis", metavar="A,B", help=f"of {', '.join(APIS)}")
    out.add_argument("--rounds", type=int, help="default 3")
    out.add_argument(
        "--starts", type=int, metavar="N", help="start every server N more times, for that alone; default 1"
    )
    out.add_argument(
        "--patience", type=float, default=20.0, metavar="S", help="wait for a quiet processor; default 20 s"
    )
    out.add_argument(
        "--quick", action="store_true", help="one round of 16 at once, 64 in and out, the demo: about 5 minutes"
    )
    out.add_argument("--render", action="store_true", help="measure nothing: draw OUT/results.json anew")
    out.add_argument("--out", type=Path, default=SERVING, help="default build/bench/serving")
    return out


def choice_of(options: argparse.Namespace) -> Choice:
    """What to measure.

    Raises:
        BenchError: an unknown name, or a number out of range.
    """
    defaults = QUICK if options.quick else FULL
    given = {key: value if getattr(options, key) is None else getattr(options, key) for key, value in defaults.items()}
    known = [f"{tokens_in}/{out}" for tokens_in, out in LENGTHS]
    lengths = chosen(given["lengths"], known, "lengths")
    try:
        users = tuple(sorted({int(part) for part in given["users"].split(",")})) if given["users"] else USERS
    except ValueError:
        raise BenchError(f"--concurrency {given['users']} is no list of whole numbers") from None
    if not all(1 <= number <= max(USERS) for number in users) or given["rounds"] < 1 or given["starts"] < 0:
        raise BenchError(f"--concurrency is 1 to {max(USERS)}, --rounds 1 or more, --starts 0 or more")
    return Choice(
        paths=(REFERENCE, *(path for path in chosen(given["paths"], tuple(PATHS), "path") if path != REFERENCE)),
        shapes=chosen(given["shapes"], SHAPES, "shape"),
        apis=chosen(options.apis, APIS, "API"),
        lengths=tuple(LENGTHS[known.index(length)] for length in lengths),
        users=users,
        rounds=given["rounds"],
        starts=given["starts"],
        patience_s=options.patience,
    )


def benchmark(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure; returns and, after every round, writes what results.json holds."""
    choice = choice_of(options)
    if (load := busy_cores()) > 0.3:
        say(f"WARNING: {load:.1f} cores are busy; the figures are only as good as the quiet")
    if not report.can_plot():
        say(f"there will be a table but no plot: {report.PLOT_FIX}")
    about = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": report.machine(),
        "ray": report.version_of("ray"),
        "rounds": choice.rounds,
        "busy_before": load,
        "choice": dataclasses.asdict(choice),
    }

    def save(found: Found) -> None:
        program.write(options.out / "results.json", json.dumps({**about, **vars(found)}, indent=1) + "\n")

    found = Bench(choice, save).run()
    save(found)
    return {**about, **vars(found)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns an exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.serving", *arguments])
    return program.run(
        "serving",
        options,
        lambda: benchmark(options, command),
        results.markdown,
        results.plot,
        "all servers are ended; finished rounds are in results.json",
    )


if __name__ == "__main__":
    sys.exit(main())
