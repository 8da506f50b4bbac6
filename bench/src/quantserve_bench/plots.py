"""Plots of measurements, drawn with matplotlib if it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from quantserve_bench.metrics import METRICS
from quantserve_bench.session import Measurement

COLOURS: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#666666", "#000000")
"""Distinguishable with every common colour blindness (Okabe and Ito)."""
INK: Final = "#222222"
QUIET: Final = "#8a8a8a"
FIX: Final = "plots need matplotlib: pip install 'quantserve[bench]'"
STYLE: Final[Mapping[str, Any]] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial", "sans-serif"],
}


class Plot(NamedTuple):
    """A drawn plot: its title, file name without suffix, and both forms."""

    title: str
    name: str
    svg: str
    png: bytes


def can_plot() -> bool:
    """Whether matplotlib is installed; imports nothing."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(measurements: Sequence[Measurement]) -> list[Plot]:
    """Every plot the measurements have data for; none without matplotlib."""
    if not can_plot():
        return []
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    complete = [m for m in measurements if m.measured.timings]
    plots = []
    with matplotlib.rc_context({**STYLE}):
        for title, name, painter in (
            ("Methods side by side", "methods", _methods),
            ("Distribution of latencies", "latency", _latency),
            ("Throughput against load", "throughput", _throughput),
        ):
            # The same data makes the same file, and ids of one drawing differ from those of another on a page.
            matplotlib.rcParams["svg.hashsalt"] = f"quantserve-{name}"
            figure = painter(complete)
            if figure is not None:
                plots.append(written(figure, title, name))
    return plots


def written(figure: Any, title: str, name: str) -> Plot:
    """A figure of matplotlib as SVG and PNG, and closed."""
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", dpi=160)
    importlib.import_module("matplotlib.pyplot").close(figure)
    text = svg.getvalue()
    return Plot(title, name, text[text.index("<svg") :], png.getvalue())


def _figure(panels: int, height: float, width: float = 3.5) -> tuple[Any, list[Any]]:
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, panels, figsize=(width * panels, height), layout="constrained", squeeze=False)
    return figure, list(axes[0])


def _colours(measurements: Sequence[Measurement]) -> dict[str, str]:
    """A colour per model, the same in every plot."""
    models = dict.fromkeys(m.served.id for m in measurements)
    return {model: COLOURS[i % len(COLOURS)] for i, model in enumerate(models)}


def _levels(measurements: Sequence[Measurement]) -> list[float]:
    return sorted({m.level for m in measurements})


def _methods(measurements: Sequence[Measurement]) -> Any | None:
    """Four panels of bars, a bar per model at the highest common load, what was expected as a mark."""
    if not measurements:
        return None
    level = max(_levels(measurements), key=lambda value: (sum(m.level == value for m in measurements), value))
    shown = [m for m in measurements if m.level == level]
    colours = _colours(measurements)
    figure, axes = _figure(4, 1.5 + 0.42 * max(2, len(shown)), width=2.9)
    marked = False
    for axis, key in zip(axes, ("e2e", "ttft", "normalized", "tokens_per_s"), strict=True):
        metric = METRICS[key]
        values = [m.measured.mean(key) or 0.0 for m in shown]
        expected = [next((v.expected for v in m.verdicts if v.key == key), None) for m in shown]
        places = range(len(shown))
        axis.barh(places, values, height=0.62, color=[colours[m.served.id] for m in shown])
        top = max([*values, *(value for value in expected if value)], default=1.0)
        for place, value, wanted in zip(places, values, expected, strict=True):
            beside = max(value, wanted or 0.0) + top * 0.02
            axis.text(beside, place, _short(value), va="center", ha="left", fontsize=8)
            if wanted:
                axis.plot([wanted, wanted], [place - 0.4, place + 0.4], color=INK, linewidth=2.2, solid_capstyle="butt")
                marked = True
        axis.set_xlim(0, top * 1.22 or 1.0)
        axis.set_yticks(list(places), [m.served.id for m in shown] if axis is axes[0] else [""] * len(shown))
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", visible=False)
        axis.invert_yaxis()
        axis.xaxis.set_major_locator(importlib.import_module("matplotlib.ticker").MaxNLocator(4))
        axis.set_title(metric.label)
        axis.set_xlabel(f"{metric.unit}, {'higher' if metric.higher_is_better else 'lower'} is better", fontsize=8)
    note = "means over requests; black marks: expected" if marked else "means over requests"
    figure.suptitle(f"{shown[0].load_label}: {note}", x=0.01, ha="left", fontsize=9, color="#555555")
    return figure


def _latency(measurements: Sequence[Measurement]) -> Any | None:
    """The share of requests (or gaps) that took at most so long, for TTFT, gaps and E2E."""
    if not measurements:
        return None
    level = max(_levels(measurements))
    shown = [m for m in measurements if m.level == level]
    colours = _colours(measurements)
    figure, axes = _figure(3, 3.3)
    for axis, key in zip(axes, ("ttft", "tpot", "e2e"), strict=True):
        metric = METRICS[key]
        for m in shown:
            values = sorted(value * metric.scale for timing in m.measured.timings for value in metric.of(timing))
            if not values:
                continue
            shares = [100 * (i + 1) / len(values) for i in range(len(values))]
            axis.step([values[0], *values], [0, *shares], where="post", color=colours[m.served.id], label=m.served.id)
        axis.set_ylim(0, 100.5)
        axis.set_xlim(left=0)
        for percent in (50, 90, 99):
            axis.axhline(percent, color="#c8c8c8", linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
        axis.set_yticks([0, 25, 50, 75, 90, 99], ["0", "25", "p50", "75", "p90", "p99"])
        axis.grid(axis="y", visible=False)
        axis.set_title(metric.label)
        axis.set_xlabel(metric.unit)
    axes[0].set_ylabel("% of requests at or below")
    _legend(figure, axes[-1])
    figure.suptitle(shown[0].load_label, x=0.01, ha="left", fontsize=9, color="#555555")
    return figure


def _throughput(measurements: Sequence[Measurement]) -> Any | None:
    """Output of all users, TPOT and TTFT over the load; None for a single load."""
    levels = _levels(measurements)
    if len(levels) < 2:
        return None
    colours = _colours(measurements)
    rates = all("req/s" in m.load_label for m in measurements)
    panels: Sequence[tuple[str, str, Callable[[Measurement], float | None]]] = (
        ("Output of all users", "tok/s", lambda m: m.measured.totals["output_tokens_per_s"]),
        ("TPOT, mean", "ms", lambda m: m.measured.mean("tpot")),
        ("TTFT, mean", "ms", lambda m: m.measured.mean("ttft")),
    )
    figure, axes = _figure(3, 3.3)
    for axis, (title, unit, value) in zip(axes, panels, strict=True):
        for model, colour in colours.items():
            points = sorted((m.level, v) for m in measurements if m.served.id == model and (v := value(m)) is not None)
            axis.plot([x for x, _ in points], [y for _, y in points], "o-", color=colour, label=model, markersize=4.5)
        axis.set_xscale("log", base=2)
        axis.set_xticks(levels, [f"{level:g}" for level in levels])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_title(title)
        axis.set_ylabel(unit)
        axis.set_xlabel("requests per second" if rates else "concurrent requests")
    _legend(figure, axes[-1])
    return figure


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        longest = max(map(len, labels))
        columns = max(1, min(len(labels), int(figure.get_figwidth() / (0.6 + 0.085 * longest))))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
