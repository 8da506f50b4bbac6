"""Plots of `quantserve quality`, with matplotlib where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantserve_quantize.measures import Scores, by_position

SMOOTH = 16
"""Positions averaged in the plot of the divergence by position."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def draw(scores: Mapping[str, Scores], length: int, folder: Path) -> list[Path]:
    """Write quality.svg: the error by block, and the divergence by position; nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    with_blocks = any(score.blocks for score in scores.values())
    with matplotlib.rc_context(
        {"svg.hashsalt": "quantserve-quality", "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure, axes = pyplot.subplots(
            1, 1 + with_blocks, figsize=(5 * (1 + with_blocks), 3.6), layout="constrained", squeeze=False
        )
        if with_blocks:
            _lines(axes[0][0], {label: [100 * e for e in score.blocks.values()] for label, score in scores.items()}, 1)
            axes[0][0].set(title="Error of each block's output", xlabel="block", ylabel="% of the reference's norm")
        positions = {label: smooth(by_position(score, length)) for label, score in scores.items()}
        _lines(axes[0][-1], positions, SMOOTH)
        axes[0][-1].set(title="KL divergence by position", xlabel="tokens before", ylabel="nats", yscale="log")
        axes[0][-1].legend(frameon=False, fontsize=8)
        path = folder / "quality.svg"
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return [path]


def smooth(values: Sequence[float]) -> list[float]:
    """Means of `SMOOTH` values each."""
    parts = [values[start : start + SMOOTH] for start in range(0, len(values), SMOOTH)]
    return [sum(part) / len(part) for part in parts]


def _lines(axis: Any, rows: Mapping[str, Sequence[float]], step: int) -> None:
    for number, (label, values) in enumerate(rows.items()):
        places = [step * index for index in range(len(values))]
        axis.plot(
            places, values, label=label, color=COLOURS[number % len(COLOURS)], marker="o", markersize=3, linewidth=1.4
        )
    axis.grid(axis="y", alpha=0.3)
