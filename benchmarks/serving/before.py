"""The serving path of this checkout beside that of another one, and beside vLLM's own server.

`python -m benchmarks.serving.before DIR`: DIR is a checkout with its own `.venv` (`make dev`). All servers have the
same model and engine arguments, and take turns; the ratios are medians over the rounds of one run.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from benchmarks import program, report
from benchmarks.console import BenchError, say
from benchmarks.serving import servers
from benchmarks.serving.cells import APIS, FAST, Cell
from benchmarks.serving.client import Client
from benchmarks.serving.measure import WARM_TOKENS, await_calm
from benchmarks.serving.models import SERVING, Model, demo_configs, planned
from benchmarks.serving.processes import busy_cores
from benchmarks.serving.servers import Server

FIGURES: Final[Mapping[str, str]] = {
    "tokens_per_s": "output tokens per second",
    "ttft_ms": "mean TTFT, ms",
    "gap_p50_ms": "median ITL, ms",
    "gap_p99_ms": "P99 ITL, ms",
    "cpu_ms_per_token": "processor time of the server, ms per token",
}
NOW, BEFORE, BARE = "this checkout", "the other checkout", "vLLM's own server"


def build(path: str, model: Model, other: Path) -> list[servers.Command]:
    """The processes of one of the three servers."""
    if path == BARE:
        return servers.bare([model])
    commands = servers.quantserve([model])
    if path == NOW:
        return commands
    python = other / ".venv" / "bin" / "python"
    if not python.is_file():
        raise BenchError(f"{python} does not exist; run `make dev` in {other}")
    return [replace(command, line=[str(python), *command.line[1:]]) for command in commands]


def measure(options: argparse.Namespace, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One entry per round, cell and server."""
    model = planned(demo_configs()[:1])[0]
    client = Client()
    running: dict[str, Server] = {}
    runs: list[dict[str, Any]] = []
    try:
        for path in (BARE, BEFORE, NOW):
            say(f"starting {path}")
            server = running[path] = Server(path.replace(" ", "-").replace("'", ""), build(path, model, options.other))
            server.start()
            server.freeze()
        for number in range(-1, options.rounds):  # the first round warms up
            for cell in cells:
                for path in sorted(running, key=lambda name: (number % 3 + list(running).index(name)) % 3):
                    run = turn(client, cell, running[path], f"{number} {cell.name}", path, options.patience)
                    if number >= 0:
                        runs.append({"round": number, "cell": cell.name, "path": path, **run})
            say(f"  round {number + 1} of {options.rounds}")
    finally:
        for server in running.values():
            server.thaw()
            server.stop()
        client.close()
    return runs


def turn(client: Client, cell: Cell, server: Server, seed: str, salt: str, patience_s: float) -> dict[str, Any]:
    """One cell on one server, while the others are stopped."""
    targets = [server.route(cell.models[0])]
    server.thaw()
    try:
        await_calm(patience_s)
        warm = replace(cell, output_tokens=WARM_TOKENS, requests=cell.users)
        client.load(warm, targets, f"wake {seed}", f"wake {salt}")
        client.prepare(cell, seed, salt)
        before = server.cpu_s()
        run = client.send(targets)
        tokens = run["tokens_per_s"] * run["duration_s"]
        return {**run, "cpu_ms_per_token": 1000 * (server.cpu_s() - before) / tokens}
    finally:
        server.freeze()


def ratios(runs: Sequence[Mapping[str, Any]], cell: str, figure: str, path: str, reference: str) -> list[float]:
    """A figure of one server relative to another one's in the same round."""
    values = {(run["round"], run["path"]): run[figure] for run in runs if run["cell"] == cell}
    rounds = sorted({number for number, _ in values})
    return [values[number, path] / values[number, reference] for number in rounds]


def markdown(found: Mapping[str, Any]) -> str:
    """The tables."""
    runs = found["runs"]
    lines = [
        f"{found['date']}; {report.machine_line(found['machine'])}",
        "",
        f"    {found['command']}",
        "",
        f"Medians of {found['rounds']} rounds; in brackets the lowest and highest one. Errors: "
        f"{sum(run['errors'] for run in runs)} of {sum(run['completed'] + run['errors'] for run in runs)} requests.",
    ]
    for cell in dict.fromkeys(run["cell"] for run in runs):
        rows = []
        for figure, name in FIGURES.items():
            row = [name, f"{statistics.median(r[figure] for r in runs if (r['cell'], r['path']) == (cell, NOW)):.2f}"]
            for reference in (BEFORE, BARE):
                own = ratios(runs, cell, figure, NOW, reference)
                row.append(f"{statistics.median(own):.3f}x ({min(own):.2f} to {max(own):.2f})")
            rows.append(row)
        lines += ["", f"### {cell}", "", report.markdown_table(["", NOW, f"over {BEFORE}", f"over {BARE}"], rows)]
    return "\n".join(lines) + "\n"


def plot(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Throughput over that of the two references, by cell."""
    runs = found["runs"]
    cells = list(dict.fromkeys(run["cell"] for run in runs))
    series = {
        f"over {reference}": [statistics.median(ratios(runs, cell, "tokens_per_s", NOW, reference)) for cell in cells]
        for reference in (BEFORE, BARE)
    }
    path = folder / "before.svg"
    report.grouped_bars(path, "Output tokens per second, this checkout", cells, series, "times the reference")
    return [path]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns an exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.before", description=__doc__.partition("\n")[0])
    parser.add_argument("other", type=Path, metavar="DIR", help="a checkout of quantserve with its own .venv")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", default="1,16", metavar="1,16", help="requests at once")
    parser.add_argument("--patience", type=float, default=20.0, metavar="S", help="wait for a quiet processor")
    parser.add_argument("--render", action="store_true", help="measure nothing: draw OUT/results.json anew")
    parser.add_argument("--out", type=Path, default=SERVING.parent / "serving-before")
    options = parser.parse_args(arguments)
    users = [int(number) for number in options.concurrency.split(",")]
    cells = [Cell(("demo-fp16",), APIS[0], 64, 64, number, FAST.requests(number, 64)) for number in users]

    def benchmark() -> dict[str, Any]:
        about = {
            "command": shlex.join(["python", "-m", "benchmarks.serving.before", *arguments]),
            "date": datetime.date.today().isoformat(),
            "machine": report.machine(),
            "rounds": options.rounds,
            "busy_before": busy_cores(),
            "cells": [dataclasses.asdict(cell) for cell in cells],
        }
        found = {**about, "runs": measure(options, cells)}
        program.write(options.out / "results.json", json.dumps(found, indent=1) + "\n")
        return found

    return program.run("before", options, benchmark, markdown, plot, "all servers are ended")


if __name__ == "__main__":
    sys.exit(main())
