"""The table and the plot of a soak."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import COLOURS, PLOT_FIX, PlotError, can_plot, machine_line, markdown_table
from benchmarks.soak.server import ROLES

PANELS = (
    ("private memory, MiB", "private", 2**20),
    ("file descriptors", "fds", 1),
    ("threads", "threads", 1),
    ("processes", "processes", 1),
)


def table(found: Mapping[str, Any]) -> str:
    """Judgements, one row per minute, faults and requests by kind, in Markdown."""
    words = {True: "ok", False: "FAILED", None: "not judged"}
    rows = [[f["name"], words[f["sound"]], f["detail"].replace("\n", "; ")] for f in found["judgements"]]
    count = {word: sum(row[1] == word for row in rows) for word in words.values()}
    verdict = f"{count['ok']} judgements passed, {count['FAILED']} failed, {count['not judged']} without enough samples"
    parts = [
        f"{machine_line(found['machine'])}",
        f"{found['minutes']:g} minutes, {found['users']} users: {verdict}.",
        markdown_table(["judgement", "result", "detail"], rows),
        markdown_table(MINUTE, [_minute(minute) for minute in found["by_minute"]]),
        markdown_table(["fault", "model", "minute", "seconds to recover"], [_fault(found, f) for f in found["faults"]]),
        markdown_table(
            ["requests", "answered", "refused", "left by the client", "failed"],
            [[kind, *map(str, counts.values())] for kind, counts in found["requests"]["kinds"].items()],
        ),
    ]
    if codes := found["requests"]["codes"]:
        parts.append(
            markdown_table(["refused with", "requests"], [[code, str(n)] for code, n in sorted(codes.items())])
        )
    return "\n\n".join(parts)


MINUTE = ["minute", "answered", "refused", "failed", *(f"{role} MiB / fds / threads / processes" for role in ROLES)]


def _minute(minute: Mapping[str, Any]) -> list[str]:
    uses = [
        f"{use['private'] / 2**20:.0f} / {use['fds']} / {use['threads']} / {use['processes']}"
        for use in (minute["roles"][role] for role in ROLES)
    ]
    return [f"{minute['minute']:.1f}", str(minute["answered"]), str(minute["refused"]), str(minute["failed"]), *uses]


def _fault(found: Mapping[str, Any], fault: Mapping[str, Any]) -> list[str]:
    took = f"{fault['until'] - fault['at']:.0f}" if fault["until"] else "not recovered"
    return [fault["name"], fault["model"] or "all", f"{(fault['at'] - found['began']) / 60:.1f}", took]


def plot(found: Mapping[str, Any], folder: Path) -> Iterable[Path]:
    """Memory, descriptors, threads and processes of each role, and requests per minute; faults as vertical lines.

    Raises:
        PlotError: no matplotlib.
    """
    if not can_plot():
        raise PlotError(PLOT_FIX)
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "quantserve"
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(len(PANELS) + 1, 1, figsize=(9, 12), sharex=True, layout="constrained")
    began = found["began"]
    for axis, (title, key, scale) in zip(axes, PANELS, strict=False):
        for number, role in enumerate(ROLES):
            points = [((s["at"] - began) / 60, s["roles"][role][key] / scale) for s in found["samples"]]
            colour = COLOURS[number + 1]
            axis.plot([x for x, _ in points], [y for _, y in points], "-", color=colour, label=role, linewidth=1.5)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_yscale("log")
        axis.set_ylim(
            bottom=0.7 * min(s["roles"][role][key] / scale for s in found["samples"] for role in ROLES) or 0.7
        )
        axis.yaxis.set_minor_locator(importlib.import_module("matplotlib.ticker").LogLocator(subs=(2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="both", labelsize=8)
    last = axes[-1]
    for number, result in enumerate(("answered", "refused", "failed")):
        points = [(minute["minute"], minute[result]) for minute in found["by_minute"]]
        last.plot(
            [x for x, _ in points],
            [y for _, y in points],
            "o-",
            color=COLOURS[(2, 3, 7)[number]],
            label=result,
            markersize=3,
        )
    last.set_title("requests per minute", loc="left", fontsize=10)
    last.set_ylim(bottom=0)
    last.set_xlabel("minutes; dotted lines: faults, shaded until all replicas were ready again")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd")
        for fault in found["faults"]:
            at, until = (fault["at"] - began) / 60, (max(fault["until"], fault["at"]) - began) / 60
            axis.axvline(at, color="#777777", linestyle=":", linewidth=0.8)
            axis.axvspan(at, until, color="#000000", alpha=0.06, linewidth=0)
    if len(found["faults"]) <= 12:
        for fault in found["faults"]:
            name, at = f"{fault['name']} {fault['model']}".strip(), (fault["at"] - began) / 60
            style = {"rotation": 90, "va": "top", "ha": "right", "fontsize": 7, "color": "#333333"}
            style["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
            axes[0].annotate(name, (at, 1), xycoords=("data", "axes fraction"), **style)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(ROLES), frameon=False)
    last.legend(frameon=False, ncols=3, fontsize=8)
    paths = [folder / "soak.png", folder / "soak.svg"]
    figure.savefig(paths[0], dpi=130)
    figure.savefig(paths[1], metadata={"Date": None})
    pyplot.close(figure)
    return paths
