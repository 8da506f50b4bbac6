"""What the load generator costs and how late its time stamps are, against a server of exact pace."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from quantserve_bench import Closed, Request, Target, measure, run, run_blocking
from quantserve_bench.markdown import table
from quantserve_bench.result import TOKENS
from quantserve_bench.statistics import summarize

TARGET = 0.05
"""Share of one core at 64 streams of 20 tokens a second."""


def measure_cost(streams: int, tokens_per_s: float, seconds: float) -> dict[str, Any]:
    """One row: share of a core, CPU time per event, how late events are seen."""
    command = [sys.executable, "-m", "benchmarks.load.pace", str(tokens_per_s)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        target = Target(f"http://127.0.0.1:{int(server.stdout.readline())}", "paced")
        tokens = max(2, round(seconds / 3 * tokens_per_s))
        request = Request(messages=[{"role": "user", "content": "x" * 400}], max_tokens=tokens)
        run_blocking(run(target, [request] * 2, Closed(2)))
        # Users join over one answer's time, so that answers end and begin all the time as they do on a real server.
        done = run_blocking(run(target, [request] * (3 * streams), Closed(streams, ramp_s=seconds / 3)))
    finally:
        server.kill()
        server.wait()
    events = [event for result in done for event in result.events if event.kind in TOKENS]
    late = summarize([event.at - float(event.text) for event in events])
    measured = measure(done)
    assert late is not None
    return {
        "streams": streams,
        "tokens_per_s": tokens_per_s,
        "events": len(events),
        "failed": int(measured.totals["errors"]),
        "held": measured.totals["concurrency_mean"],
        "share": done.client_share,
        "us_per_event": 1e6 * done.cpu_s / len(events),
        "late_ms": {"mean": 1000 * late.mean, "p50": 1000 * late.median, "p99": 1000 * late.percentiles[99]},
        "tpot_error": (measured.mean("tpot") or 0.0) / (1000 / tokens_per_s) - 1,
    }


def show(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    header = ("streams", "tok/s each", "events", "streams held", "share of a core", "CPU per event, us",
              "seen late, p50 ms", "p99 ms", "TPOT off by")  # fmt: skip
    cells = [
        [
            str(row["streams"]),
            f"{row['tokens_per_s']:g}",
            f"{row['events']:,}",
            f"{row['held']:.1f}",
            f"{row['share']:.1%}",
            f"{row['us_per_event']:.1f}",
            f"{row['late_ms']['p50']:.2f}",
            f"{row['late_ms']['p99']:.2f}",
            f"{row['tpot_error']:+.2%}",
        ]
        for row in rows
    ]
    return table(header, cells, left=0)
