"""Terminal output of ``quantserve bench``: a progress bar during measurements, tables afterwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from quantserve.cli.output import table
from quantserve_bench import markdown
from quantserve_bench.client import Live
from quantserve_bench.load import Load, describe
from quantserve_bench.plots import FIX, can_plot
from quantserve_bench.served import Served
from quantserve_bench.session import Measurement

FIRST_TOKENS_SHOWN: Final = 50
RATE_OVER_S: Final = 3.0
COLUMNS: Final = ("model", "method", "load", "E2E", "TTFT", "ITL", "tok/s", "tok/s of all users", "errors")


class Display:
    """A progress bar per measurement, if the output is a terminal; a context manager."""

    def __init__(self, out: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[now]}"),
            console=out,
            disable=not out.is_terminal,
            auto_refresh=False,  # no refresh thread, which would disturb the measurement
        )
        self._tasks: dict[str, TaskID] = {}
        self._seen: dict[str, deque[tuple[float, int]]] = {}

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def waiting(self, label: str) -> Callable[[float], None]:
        """The callback that shows the seconds while a server starts."""

        def show(seconds: float) -> None:
            task = self._task(label, f"starting {label}", None)
            self._progress.update(task, now=f"{seconds:.0f} s", refresh=True)

        return show

    def started(self, label: str) -> None:
        """The server is ready."""
        self._progress.remove_task(self._task(label, label, None))
        self._tasks.pop(label, None)

    def show(self, served: Served, load: Load, live: Live, planned: int | None) -> None:
        """Show the counters of the running measurement."""
        label = f"{served.id}, {describe(load)}"
        task = self._task(label, label, planned)
        now = perf_counter()
        seen = self._seen.setdefault(label, deque())
        seen.append((now, live.events))
        while now - seen[0][0] > RATE_OVER_S and len(seen) > 2:
            seen.popleft()
        rate = (live.events - seen[0][1]) / (now - seen[0][0]) if now > seen[0][0] else 0.0
        recent = live.first_tokens[-FIRST_TOKENS_SHOWN:]
        parts = [f"{rate:,.0f} tok/s", f"{live.in_flight} in flight"]
        if recent:
            parts.insert(1, f"TTFT {1000 * sum(recent) / len(recent):,.0f} ms")
        if live.failed:
            parts.append(f"[red]{live.failed} failed[/]")
        self._progress.update(task, completed=live.finished, now=", ".join(parts), refresh=True)

    def _task(self, key: str, label: str, total: int | None) -> TaskID:
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(escape(label), total=total, now="")
        return self._tasks[key]


def print_results(out: Console, measurements: Sequence[Measurement], folder: Path) -> None:
    """Print the result tables."""
    shown = [
        [
            escape(m.served.id),
            escape(markdown.method_of(m)),
            m.load_label,
            *(markdown.number(m.measured.mean(key)) for key in markdown.SEED_KEYS),
            markdown.number(m.measured.totals["output_tokens_per_s"]),
            _errors(m),
        ]
        for m in measurements
    ]
    title = "Means per request in ms; ITL is E2E / output tokens, tok/s is per user"
    out.print(table(title, COLUMNS, shown, wrap=("model", "method", "errors")))
    if verdicts := markdown.verdict_rows(measurements):
        colours = {"worse": "red", "better": "green"}
        rows = [
            [*map(escape, row[:-1]), f"[{colours[row[-1]]}]{row[-1]}[/]" if row[-1] in colours else row[-1]]
            for row in verdicts
        ]
        out.print(table("Expected beside measured", markdown.VERDICT_COLUMNS, rows))
        for note in dict.fromkeys(map(markdown.expected_note, measurements)):
            if note:
                out.print(f"  [dim]{escape(note)}[/]", soft_wrap=True)
    for line in markdown.warning_lines(measurements):
        out.print(f"  [yellow]warning[/] {escape(line)}", soft_wrap=True)
    if not can_plot():
        out.print(f"  [dim]{escape(FIX)}[/]")
    out.print(f"  results: {escape(str(folder))}/report.html, report.md, results.json, requests.csv", soft_wrap=True)


def _errors(measurement: Measurement) -> str:
    codes = ", ".join(f"{count} x {code}" for code, count in measurement.measured.error_codes.items())
    return f"[red]{escape(codes)}[/]" if codes else "0"
