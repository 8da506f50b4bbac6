"""From measured runs to ratios, targets, tables and plots."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks import report
from benchmarks.serving.cells import OURS, PATHS, PEER, REFERENCE

Found = Mapping[str, Any]
GROUPS: Final = {
    "demo": "One model: demo-fp16",
    "three": "Several models: demo-fp16, demo-awq, demo-squeezellm",
    "small": "One model: 0.1 billion weights",
    "pair": "Two models: 0.1 billion weights, demo-fp16 beside it",
}
FIGURES: Final = {
    "tokens_per_s": ("Output tokens per second", "tok/s"),
    "ttft_ms": ("Mean time to first token", "ms"),
    "gap_p99_ms": ("P99 gap between chunks", "ms"),
}


@dataclass(frozen=True)
class Target:
    """What a path has to reach, relative to vLLM's own server.

    Attributes:
        paths: it is for.
        figure: a key of `FIGURES`.
        limit: of the median of the ratios.
        most: whether the limit is the most allowed; else the least.
    """

    paths: tuple[str, ...]
    figure: str
    limit: float
    most: bool

    def met(self, ratio: float) -> bool:
        """Whether a ratio keeps it."""
        return ratio <= self.limit if self.most else ratio >= self.limit

    @property
    def words(self) -> str:
        """For the table."""
        title = FIGURES[self.figure][0]
        limit = f"at {'most' if self.most else 'least'} {self.limit:g}x"
        return f"{', '.join(self.paths)}: {title[0].lower()}{title[1:]}, {limit}"


TARGETS: Final = (
    Target(("one", "route"), "tokens_per_s", 0.95, most=False),
    Target(("one", "route"), "ttft_ms", 1.15, most=True),
    Target(("one", "route"), "gap_p99_ms", 1.3, most=True),
    Target(("shared",), "tokens_per_s", 0.85, most=False),
    Target(("shared",), "ttft_ms", 1.4, most=True),
    Target(("shared",), "gap_p99_ms", 1.5, most=True),
)
TIMES_PEER: Final = 2.0
"""Least output tokens per second of our paths relative to Ray Serve LLM as it comes."""


@dataclass(frozen=True)
class Ratio:
    """A path against vLLM's own server, in one cell and figure.

    Attributes:
        group, path, cell, figure: which.
        rounds: ratios within each round.
        value, reference: medians, in the figure's unit.
        failed: requests without a complete answer, in all rounds.
    """

    group: str
    path: str
    cell: str
    figure: str
    rounds: tuple[float, ...]
    value: float
    reference: float
    failed: int

    @property
    def middle(self) -> float:
        """The median."""
        return median(self.rounds)

    @property
    def worst(self) -> float:
        """The round that is worst for the path."""
        return min(self.rounds) if self.figure == "tokens_per_s" else max(self.rounds)


def ratios(found: Found) -> list[Ratio]:
    """Every path in every cell and figure against vLLM's own server beside it, in the order of measuring."""
    sorted_runs: dict[tuple[str, str, str], dict[str, dict[int, Mapping[str, Any]]]] = {}
    for run in found["runs"]:
        place = sorted_runs.setdefault((run["group"], run["server"], run["cell"]), {})
        place.setdefault(run["path"], {})[run["round"]] = run
    out = []
    for (group, _, cell), paths in sorted_runs.items():
        reference = paths.get(REFERENCE, {})
        for path, rounds in paths.items():
            if path == REFERENCE:
                continue
            for figure in FIGURES:
                pairs = [
                    (run[figure], reference[number][figure])
                    for number, run in sorted(rounds.items())
                    if number in reference and run[figure] is not None and reference[number][figure]
                ]
                if pairs:
                    values, references = zip(*pairs, strict=True)
                    each = tuple(own / theirs for own, theirs in pairs)
                    failed = sum(run["errors"] for run in rounds.values())
                    out.append(Ratio(group, path, cell, figure, each, median(values), median(references), failed))
    return out


def markdown(found: Found) -> str:
    """The whole report."""
    all_ratios = ratios(found)
    lines = [
        f"{found['date']}; {report.machine_line(found['machine'])}; Ray {found['ray']}",
        "",
        f"    {found['command']}",
        "",
        "### Targets",
        "",
        target_table(all_ratios),
    ]
    for group, title in GROUPS.items():
        own = [ratio for ratio in all_ratios if ratio.group == group]
        if own:
            lines += ["", f"### {title}"]
            for figure, (heading, unit) in FIGURES.items():
                lines += ["", figure_table([r for r in own if r.figure == figure], f"{heading}, {unit}")]
    lines += ["", "### Start and idling", "", start_table(found["starts"])]
    lines += ["", notes(found)]
    for path, reason in found["refused"].items():
        lines.append(f"\n`{path}` was not measured: refused: {reason}")
    return "\n".join(lines).rstrip() + "\n"


def target_table(all_ratios: Sequence[Ratio]) -> str:
    """One row per target: in how many cells it is met, and the cell closest to missing it or farthest beyond."""
    rows = []
    for target in TARGETS:
        for path in target.paths:
            own = [r for r in all_ratios if r.path == path and r.figure == target.figure]
            rows.append([words_of(target, path), *judged(own, target)])
    for path in OURS:
        against = against_peer(all_ratios, path)
        target = Target((path,), "tokens_per_s", TIMES_PEER, most=False)
        rows.append(
            [f"{path}: tokens per second, at least {TIMES_PEER:g}x Ray Serve LLM as it comes", *judged(against, target)]
        )
    return report.markdown_table(["target", "met", "worst cell"], rows)


def words_of(target: Target, path: str) -> str:
    """A target's words for one of its paths."""
    return Target((path,), target.figure, target.limit, target.most).words


def judged(own: Sequence[Ratio], target: Target) -> list[str]:
    """`12 of 12` and the worst cell."""
    if not own:
        return ["-", "not measured"]
    worst = (max if target.most else min)(own, key=lambda ratio: ratio.middle)
    passed = sum(target.met(ratio.middle) for ratio in own)
    figure = f"{worst.middle:.2f}x"
    return [f"{passed} of {len(own)}", f"{figure if target.met(worst.middle) else f'**{figure} ✗**'}: {worst.cell}"]


def against_peer(all_ratios: Sequence[Ratio], path: str) -> list[Ratio]:
    """Tokens per second of a path relative to Ray Serve LLM as it comes, in the cells that both were measured in.

    Both are known relative to vLLM's own server, so this is the ratio of two medians.
    """
    peers = {r.cell: r for r in all_ratios if r.path == PEER and r.figure == "tokens_per_s"}
    return [
        Ratio(
            r.group, path, r.cell, r.figure, (r.middle / peers[r.cell].middle,), r.value, peers[r.cell].value, r.failed
        )
        for r in all_ratios
        if r.path == path and r.figure == "tokens_per_s" and r.cell in peers
    ]


def figure_table(own: Sequence[Ratio], title: str) -> str:
    """Cells down, paths across: the median ratio, and in brackets the worst round."""
    paths = [path for path in PATHS if any(ratio.path == path for ratio in own)]
    cells = list(dict.fromkeys(ratio.cell for ratio in own))
    by_place = {(ratio.cell, ratio.path): ratio for ratio in own}
    rows = []
    for cell in cells:
        references = [ratio.reference for ratio in own if ratio.cell == cell]
        rows.append([cell, number(median(references)), *(figure_cell(by_place.get((cell, path))) for path in paths)])
    return report.markdown_table([title, REFERENCE, *paths], rows)


def figure_cell(ratio: Ratio | None) -> str:
    """`0.97x (0.91x)`, in bold with a cross where a target is missed."""
    if ratio is None:
        return "-"
    text = f"{ratio.middle:.2f}x"
    if any(ratio.path in t.paths and ratio.figure == t.figure and not t.met(ratio.middle) for t in TARGETS):
        text = f"**{text} ✗**"
    if len(ratio.rounds) > 1:
        text += f" ({ratio.worst:.2f}x)"
    return text + (f" {ratio.failed} failed" if ratio.failed else "")


def start_table(starts: Sequence[Mapping[str, Any]]) -> str:
    """One row per server and set of models: seconds to the first token, idle processor time, memory."""
    kinds: dict[tuple[str, tuple[str, ...]], list[Mapping[str, Any]]] = {}
    for start in starts:
        kinds.setdefault((start["server"], tuple(start["first_token_s"])), []).append(start)
    rows = []
    for (server, models), each in sorted(kinds.items(), key=lambda kind: (len(kind[0][1]), kind[0][1], kind[0][0])):
        last = [max(start["first_token_s"].values()) for start in each]
        idle = median(start["idle_cores"] for start in each)
        memory = median(start["memory_bytes"] for start in each)
        spread = f" ({min(last):.1f} to {max(last):.1f})" if len(last) > 1 else ""
        rows.append(
            [
                ", ".join(models),
                server,
                f"{median(last):.1f}{spread}",
                str(len(last)),
                f"{idle:.1%}",
                f"{memory / 1e9:.1f}",
            ]
        )
    header = [
        "models",
        "server",
        "command to first token of all, s",
        "starts",
        "idle, share of a core",
        "own memory, GB",
    ]
    return report.markdown_table(header, rows)


def notes(found: Found) -> str:
    """What a reader has to know about the figures."""
    runs = found["runs"]
    share = max((run["client_share"] for run in runs), default=0.0)
    lag = max((run["lag_max_ms"] for run in runs), default=0.0)
    failed = sum(run["errors"] for run in runs)
    each = Counter((run["group"], run["server"], run["path"], run["cell"]) for run in runs)
    done = " to ".join(map(str, sorted({min(each.values(), default=0), max(each.values(), default=0)})))
    place = "before" if found["client_priority"] else "beside"
    others = [run["other_cores"] for run in runs]
    return (
        f"Medians of {done} of {found['rounds']} rounds, relative to `{REFERENCE}` in the same one; "
        "the worst in brackets. "
        f"The client used up to {share:.0%} of a core, {place} all others; "
        f"its event loop was at most {lag:.0f} ms late. "
        f"Other processes used {median(others or [0.0]):.2f} cores in the median cell, "
        f"{max(others, default=0.0):.2f} at most. "
        f"{failed} of {sum(run['completed'] + run['errors'] for run in runs)} requests failed."
    )


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def plot(found: Found, folder: Path) -> list[Path]:
    """Bars of the ratios, a figure per group and figure; the PNG files written.

    Raises:
        report.PlotError: matplotlib is not installed.
    """
    all_ratios = ratios(found)
    paths = []
    for group in GROUPS:
        for figure, (title, _) in FIGURES.items():
            own = [ratio for ratio in all_ratios if ratio.group == group and ratio.figure == figure]
            if not own:
                continue
            path = folder / f"serving-{group}-{figure.split('_')[0]}.png"
            heading = f"{title} relative to vLLM's own server"
            groups = list(map(label, cells_of(own)))
            report.grouped_bars(path, heading, groups, series(own), f"times {REFERENCE}", first_colour=1)
            paths.append(path)
    return paths


def cells_of(own: Iterable[Ratio]) -> list[str]:
    """Their cells, in order."""
    return list(dict.fromkeys(ratio.cell for ratio in own))


def label(cell: str) -> str:
    """A cell's name on several lines, for the axis."""
    who, what, users = cell.split(", ")
    return "\n".join([who.removeprefix("demo-"), *what.split(" "), users])


def series(own: Sequence[Ratio]) -> dict[str, list[float]]:
    """Path -> median ratio per cell; NaN where it was not measured."""
    by_place = {(ratio.path, ratio.cell): ratio.middle for ratio in own}
    return {
        path: [by_place.get((path, cell), math.nan) for cell in cells_of(own)]
        for path in PATHS
        if any(ratio.path == path for ratio in own)
    }
