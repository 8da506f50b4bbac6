"""From seconds per round to ratios, targets, tables and the plot. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.gpu.formats import ABOUT, CUBLAS, DEFAULT, FOUR, THREE
from benchmarks.kernels.plots import measured
from benchmarks.kernels.results import Cell, Check, gigabytes, place, seconds, speedup
from benchmarks.kernels.tables import by_shape, marked

Found = Mapping[str, Any]

TARGETS = {
    "single": f"batch 1, at least 2.5x {CUBLAS}",
    "bandwidth": "batch 1, at least 60 % of the copy bandwidth",
    "small": f"batch 1 to 64, never below {CUBLAS}",
    "decode": f"decode loop at batch 1, at least 2x {CUBLAS}",
}
SINGLE, BANDWIDTH, SMALL, DECODE = 2.5, 0.60, 1.0, 2.0
SMALL_BATCH = 64


# --- targets --------------------------------------------------------------------------------------------


def share(cell: Cell, name: str, copy: float | None) -> float | None:
    """Bytes of weight per second relative to the copy bandwidth, in bytes per second."""
    return gigabytes(cell, name) * 1e9 / copy if copy and name in cell["seconds"] else None


def single_check(cell: Cell, name: str) -> Check | None:
    """The target for the speed at batch 1."""
    value = speedup(cell, name, CUBLAS)
    if value is None or cell["batch"] != 1 or name not in DEFAULT:
        return None
    return Check("single", place(cell), value, SINGLE)


def small_check(cell: Cell, name: str) -> Check | None:
    """The target for the speed at small batches."""
    value = speedup(cell, name, CUBLAS)
    if value is None or cell["batch"] > SMALL_BATCH or name not in DEFAULT:
        return None
    return Check("small", f"{place(cell)}, batch {cell['batch']}", value, SMALL)


def share_check(cell: Cell, name: str, copy: float | None) -> Check | None:
    """The target for the share of the copy bandwidth, of 4 bits."""
    value = share(cell, name, copy)
    return Check("bandwidth", place(cell), value, BANDWIDTH) if value and cell["batch"] == 1 and name == FOUR else None


def decode_check(cell: Cell, name: str) -> Check | None:
    """The target of the decode loop."""
    value = speedup(cell, name, CUBLAS)
    return Check("decode", "batch 1", value, DECODE) if value and cell["batch"] == 1 and name in (FOUR, THREE) else None


def checks(found: Found, name: str) -> Iterator[Check]:
    """All of a format."""
    copy = found["copy_bytes_per_s"]
    for cell in found["cells"]:
        for check in (single_check(cell, name), share_check(cell, name, copy), small_check(cell, name)):
            if check is not None:
                yield check
    for cell in decode_cells(found):
        if (check := decode_check(cell, name)) is not None:
            yield check


def decode_cells(found: Found) -> Sequence[Cell]:
    """Those of the decode loop; none where it was not measured."""
    return found["decode"]["cells"] if found["decode"] else []


# --- tables ---------------------------------------------------------------------------------------------


def markdown(found: Found) -> str:
    """The whole report."""
    used = [name for name in ABOUT if name in found["formats"]]
    lines = [
        f"{found['date']}; {report.machine_line(found['machine'])}",
        "",
        f"    {found['command']}",
        "",
        "Formats: " + "; ".join(f"`{name}` is {ABOUT[name]}" for name in used) + ".",
        "",
        method(found),
    ]
    if found["stopped"]:
        lines += ["", f"**Not complete:** the run ended after {found['seconds']:g} s, before all was measured."]
    lines += [f"\n`{what}` was not measured: {reason}" for what, reason in found["refused"].items()]
    for title, table, about in (
        ("Targets", target_table(found), ""),
        ("Decode loop", decode_table(found), decode_notes(found)),
        (f"{CUBLAS}, µs", cublas_table(found), ""),
        *((f"{name} relative to {CUBLAS}", ratio_table(found, name), "") for name in used),
        ("Batch 1", single_table(found, used), "GB/s are bytes of weight per second, beside the copy bandwidth."),
        ("Error", error_table(found, used), "The norm of the error over the norm, against W and sums in float32."),
    ):
        if table:
            lines += ["", f"### {title}", "", table, *(["", about] if about else [])]
    return "\n".join(lines) + "\n"


def method(found: Found) -> str:
    """How it was measured, with the copy bandwidth."""
    copy, cache = found["copy_bytes_per_s"], found["cache_bytes"] / 2**20
    bandwidth = "" if copy is None else f"Copy bandwidth {copy / 1e9:.0f} GB/s, read plus written. "
    return (
        f"{bandwidth}The contenders of a cell alternate, replayed from CUDA graphs that go through copies of the "
        f"weight, which together exceed {found['caches']} times the L2 cache ({cache:.0f} MiB). x is bfloat16. Times "
        "are medians over the rounds, ratios medians of the ratios within a round. A figure in bold with a ✗ misses "
        "its target."
    )


def target_table(found: Found) -> str:
    """One row per target and format: in how many cells it is met, and the lowest figure."""
    rows = []
    for target, words in TARGETS.items():
        for name in DEFAULT:
            own = [check for check in checks(found, name) if check.target == target]
            if own:
                worst = min(own, key=lambda check: check.value)
                figure = marked(worst.value, worst, "%" if target == "bandwidth" else "x")
                met = f"{sum(check.passed for check in own)} of {len(own)}"
                rows.append([f"{name}: {words}", met, f"{figure}: {worst.where}"])
    return report.markdown_table(["target", "met", "worst cell"], rows) if rows else ""


def decode_table(found: Found) -> str:
    """One row per variant: milliseconds of a step and the speed relative to bfloat16, by batch size."""
    cells = decode_cells(found)
    rows = []
    for name in dict.fromkeys(name for cell in cells for name in cell["seconds"]):
        figures = []
        for cell in cells:
            measured_here = name in cell["seconds"]
            figures.append(f"{1e3 * seconds(cell, name):.2f}" if measured_here else "-")
            figures.append("" if name == CUBLAS else marked(speedup(cell, name, CUBLAS), decode_check(cell, name)))
        rows.append([name, *figures])
    header = [text for cell in cells for text in (f"batch {cell['batch']}, ms", "")]
    return report.markdown_table(["linears", *header], rows) if rows else ""


def decode_notes(found: Found) -> str:
    """What a step is."""
    if not found["decode"]:
        return ""
    decode = found["decode"]
    return (
        f"A step is one token for each sequence: {decode['layers']} layers of Llama-2 7B with attention to "
        f"{decode['context']} tokens, and an lm_head in bfloat16, in plain torch as one CUDA graph, {decode['steps']} "
        "steps a round. Random weights; no rotary embedding, and the position does not advance."
    )


def batches_of(found: Found) -> list[int]:
    """Those measured, in their order."""
    return list(dict.fromkeys(cell["batch"] for cell in found["cells"]))


def table_by_batch(found: Found, text: Mapping[str, Mapping[int, str]]) -> str:
    """A row per linear, a column per batch; `-` where there is no text, nothing at all without any."""
    batches = batches_of(found)
    rows = [[title, *(own.get(batch, "-") for batch in batches)] for title, own in text.items() if own]
    return report.markdown_table(["", *(f"batch {batch}" for batch in batches)], rows) if rows else ""


def cublas_table(found: Found) -> str:
    """Microseconds of cuBLAS."""
    text = {
        title: {cell["batch"]: f"{1e6 * seconds(cell, CUBLAS):.1f}" for cell in cells if CUBLAS in cell["seconds"]}
        for title, cells in by_shape(found["cells"]).items()
    }
    return table_by_batch(found, text)


def ratio_table(found: Found, name: str) -> str:
    """How many times as fast as cuBLAS a format is."""
    text: dict[str, dict[int, str]] = {}
    for title, cells in by_shape(found["cells"]).items():
        own = text[title] = {}
        for cell in cells:
            if (ratio := speedup(cell, name, CUBLAS)) is not None:
                own[cell["batch"]] = marked(ratio, single_check(cell, name) or small_check(cell, name))
    return table_by_batch(found, text)


def single_table(found: Found, formats: Sequence[str]) -> str:
    """Batch 1 in detail."""
    copy = found["copy_bytes_per_s"]
    rows = []
    for title, cells in by_shape([cell for cell in found["cells"] if cell["batch"] == 1]).items():
        for name in (CUBLAS, *formats):
            for cell in (cell for cell in cells if name in cell["seconds"]):
                rows.append(
                    [
                        f"{title}: {name}",
                        f"{1e6 * seconds(cell, name):.1f}",
                        f"{cell['bytes'][name] / 1e6:.1f}",
                        f"{gigabytes(cell, name):.0f}",
                        marked(share(cell, name, copy), share_check(cell, name, copy), "%"),
                        marked(speedup(cell, name, CUBLAS), single_check(cell, name)),
                    ]
                )
    header = ["", "µs", "MB of weight", "GB/s", "of copy bandwidth", f"vs {CUBLAS}"]
    return report.markdown_table(header, rows) if rows else ""


def error_table(found: Found, formats: Sequence[str]) -> str:
    """The largest error of every contender over all linears, by batch size."""
    batches = list(dict.fromkeys(error["batch"] for error in found["errors"]))
    rows = []
    for name in (CUBLAS, *formats):
        own = [error for error in found["errors"] if error["format"] == name]
        if own:
            worst = [max((e["error"] for e in own if e["batch"] == batch), default=math.nan) for batch in batches]
            rows.append([name, *(f"{value:.2%}" for value in worst)])
    return report.markdown_table(["", *(f"batch {batch}" for batch in batches)], rows) if rows else ""


# --- the plot -------------------------------------------------------------------------------------------


def plot(found: Found, folder: Path) -> list[Path]:
    """Speed over cuBLAS by batch size, a line per format; the files written, none without a ratio.

    Raises:
        report.PlotError: matplotlib is not installed.
    """
    batches = batches_of(found)
    series = {name: [over_linears(found, name, batch) for batch in batches] for name in found["formats"]}
    series = {name: values for name, values in series.items() if not all(map(math.isnan, values))}
    if not series:
        return []
    path = folder / "gpu-speed.svg"
    title = f"Speed relative to {CUBLAS}, {measured(found)}, {found['machine'].get('gpu', 'GPU')}"
    report.lines(path, title, batches, series, "batch size", "times as fast (geometric mean)", 1.0, log2_y=True)
    return [path]


def over_linears(found: Found, name: str, batch: int) -> float:
    """The geometric mean of the speed over cuBLAS; NaN where it was not measured."""
    ratios = [speedup(cell, name, CUBLAS) for cell in found["cells"] if cell["batch"] == batch]
    logs = [math.log(ratio) for ratio in ratios if ratio is not None]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan
