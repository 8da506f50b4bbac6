"""The plots of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.kernels import results
from benchmarks.kernels.results import TORCH, VLLM_AWQ, VLLM_BF16, Run
from benchmarks.kernels.tables import words


def draw(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Two figures per number of threads; the PNG files written.

    Raises:
        report.PlotError: matplotlib is not installed.
    """
    out = []
    for run in (run for run in found["runs"] if run["cells"]):
        for name, figure in {"speed": speed, "bandwidth": bandwidth}.items():
            path = folder / f"kernels-{name}-{run['threads']}t.png"
            if figure(path, run, found["formats"]):
                out.append(path)
    return out


def speed(path: Path, run: Run, formats: Sequence[str]) -> bool:
    """Speed over torch bf16 by batch size, a line per contender."""
    batches = list(dict.fromkeys(cell["batch"] for cell in run["cells"]))
    series = {
        name: [over_shapes(run, name, batch) for batch in batches]
        for name in (VLLM_BF16, *formats, VLLM_AWQ)
        if any(name in cell["seconds"] for cell in run["cells"])
    }
    title = f"Speed relative to torch's bf16 linear, {measured(run)}, {words(run)}"
    report.lines(path, title, batches, series, "batch size", "times as fast (geometric mean)", 1.0, log2_y=True)
    return True


def over_shapes(run: Run, name: str, batch: int) -> float:
    """The geometric mean of the speed over torch bf16; NaN where it was not measured."""
    ratios = [results.speedup(cell, name, TORCH) for cell in run["cells"] if cell["batch"] == batch]
    logs = [math.log(ratio) for ratio in ratios if ratio is not None]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def bandwidth(path: Path, run: Run, formats: Sequence[str]) -> bool:
    """GB/s of weights at batch 1, a bar per contender; False when batch 1 was not measured."""
    cells = [cell for cell in run["cells"] if cell["batch"] == 1]
    if not cells:
        return False
    names = [name for name in (TORCH, *formats, VLLM_AWQ) if name in cells[0]["seconds"]]
    series = {name: [results.gigabytes(cell, name) for cell in cells] for name in names}
    groups = [f"{results.place(cell)}\n{cell['shape']['n']}x{cell['shape']['k']}" for cell in cells]
    read = results.read_speed(run)
    dashed = f"; dashed: read bandwidth, {read:.1f} GB/s" if read is not None else ""
    report.grouped_bars(path, f"Weights read at batch 1, {words(run)}{dashed}", groups, series, "GB/s", reference=read)
    return True


def measured(run: Run) -> str:
    """`Llama-2 7B, 4 linears`."""
    models = dict.fromkeys(cell["shape"]["model"].upper() for cell in run["cells"])
    count = len({results.place(cell) for cell in run["cells"]})
    return f"{count} linear{'s' if count > 1 else ''} of Llama-2 {'/'.join(models)}"
