"""The Markdown of a run: what docs/performance.md includes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import report
from benchmarks.kernels import results
from benchmarks.kernels.formats import FORMATS
from benchmarks.kernels.results import DENSE, JUDGED, TARGETS, TORCH, VLLM_AWQ, VLLM_BF16, Cell, Check, Run

Found = Mapping[str, Any]
SPEEDS = (TORCH, VLLM_AWQ, VLLM_BF16)  # what the table of batch 1 compares with


def marked(value: float | None, check: Check | None = None, unit: str = "x") -> str:
    """A figure, in bold with a cross where it misses its target."""
    if value is None:
        return "-"
    text = f"{value:.0%}" if unit == "%" else f"{value:.2f}{unit}"
    return f"**{text} ✗**" if check is not None and not check.passed else text


def by_shape(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells of every shape, by a title such as `7b qkv 12288x4096`."""
    out: dict[str, list[Cell]] = {}
    for cell in cells:
        out.setdefault(f"{results.place(cell)} {cell['shape']['n']}x{cell['shape']['k']}", []).append(cell)
    return out


def target_table(found: Found) -> str:
    """One row per target: how many figures meet it, and the one closest to missing it or farthest beyond."""
    groups = {words(run): list(results.checks(run, found["formats"])) for run in found["runs"]}
    errors = [results.error_check(error) for error in found["errors"]]
    rows = []
    for key, text in TARGETS.items():
        each = [[check for check in group if check.target == key] for group in groups.values()]
        if key == "error":
            each = [errors] * max(1, len(groups))
        if any(each):
            rows.append([text, *(summary(group) for group in (each[:1] if key == "error" else each))])
    width = max(map(len, rows), default=1)
    header = ["target", *(groups or ["all"])]
    return report.markdown_table(header[:width], [row + [""] * (width - len(row)) for row in rows])


def summary(group: Sequence[Check]) -> str:
    """`8 of 8 (lowest 5.31x: 7b down, awq)`."""
    if not group:
        return "-"
    most = group[0].most
    worst = (max if most else min)(group, key=lambda check: check.value)
    passed = sum(check.passed for check in group)
    figure = marked(worst.value, worst, "%" if worst.target == "bandwidth" else "x")
    return f"{passed} of {len(group)} ({'highest' if most else 'lowest'} {figure}: {worst.where})"


def error_table(found: Found) -> str:
    """One row per format and shape, one column per input type: the worst ratio of all batches and instruction sets."""
    cells: dict[str, dict[str, Check]] = {}
    for error in found["errors"]:
        row = cells.setdefault(f"{error['format']} {error['n']}x{error['k']}", {})
        check = results.error_check(error)
        if error["dtype"] not in row or check.value > row[error["dtype"]].value:
            row[error["dtype"]] = check
    dtypes = list(dict.fromkeys(error["dtype"] for error in found["errors"]))
    rows = [[name, *(marked(row[dtype].value, row[dtype]) for dtype in dtypes)] for name, row in cells.items()]
    return report.markdown_table(["", *dtypes], rows)


def speed_table(run: Run, formats: Sequence[str]) -> str:
    """One row per shape and contender: speed over torch bf16 by batch size."""
    batches = list(dict.fromkeys(cell["batch"] for cell in run["cells"]))
    rows = []
    for title, cells in by_shape(run["cells"]).items():
        at = {cell["batch"]: cell for cell in cells}
        there = [at[batch] for batch in batches]
        rows.append([f"**{title}**: {TORCH}, ms", *(f"{1e3 * results.seconds(cell, TORCH):.3g}" for cell in there)])
        for name in (VLLM_BF16, VLLM_AWQ, *formats):
            if name in cells[0]["seconds"]:
                values = (marked(results.speedup(cell, name, TORCH), results.speed_check(cell, name)) for cell in there)
                rows.append([name, *values])
    return report.markdown_table(["", *(f"batch {batch}" for batch in batches)], rows)


def single_table(run: Run, formats: Sequence[str]) -> str:
    """Batch 1 in detail; empty when it was not measured."""
    rows = []
    for title, cells in by_shape(run["cells"]).items():
        for cell in (cell for cell in cells if cell["batch"] == 1):
            for name in (TORCH, VLLM_BF16, VLLM_AWQ, *formats):
                if name in cell["seconds"]:
                    rows.append([f"{title}: {name}", *single_row(cell, name)])
    header = ["", "µs", "GB/s", "of bandwidth", *(f"vs {name}" for name in SPEEDS), f"time / {DENSE}"]
    return report.markdown_table(header, rows) if rows else ""


def single_row(cell: Cell, name: str) -> list[str]:
    """The figures of one contender at batch 1."""
    return [
        f"{1e6 * results.seconds(cell, name):.0f}",
        f"{results.gigabytes(cell, name):.1f}",
        marked(results.share(cell, name), results.share_check(cell, name), "%"),
        marked(results.speedup(cell, name, TORCH), results.speed_check(cell, name)),
        marked(results.speedup(cell, name, VLLM_AWQ), results.vllm_check(cell, name)),
        marked(results.speedup(cell, name, VLLM_BF16)),
        marked(results.speedup(cell, DENSE, name), results.time_check(cell, name)),
    ]


def isa_table(run: Run, formats: Sequence[str]) -> str:
    """Batch 1 with every instruction set, the best first; empty when it was not measured."""
    isas = list(reversed(run["isas"]))
    rows = []
    for title, cells in by_shape(run["isa_cells"]).items():
        for name in formats:
            values = [marked(results.speedup(cells[0], name, TORCH))]
            for isa in isas[1:]:
                forced = results.speedup(cells[0], f"{name} @{isa}", TORCH)
                values.append(marked(forced, results.isa_check(cells[0], name, isa)))
            rows.append([f"{title}: {name}", *values])
    return report.markdown_table(["", *isas], rows) if rows and len(isas) > 1 else ""


def markdown(found: Found) -> str:
    """The whole report."""
    used = {name: FORMATS[name].about for name in found["formats"] if name in FORMATS}
    lines = [
        f"{found['date']}; {report.machine_line(found['machine'])}; load at the start {found['load']:.2f}",
        "",
        f"    {found['command']}",
        "",
        "Formats: " + "; ".join(f"`{name}` is {about}" for name, about in used.items()) + ".",
        "",
        "One process per number of threads. The contenders of a cell alternate call by call, each on the next of the "
        f"copies of its weight, which together exceed {found['caches']} times the cache "
        f"({found['cache_bytes'] / 2**20:.0f} MiB). x is bfloat16. Times are medians over the rounds, ratios medians "
        "of the ratios within a round. A figure in bold with a ✗ misses its target; "
        f"targets are for {', '.join(JUDGED[:-1])} and {JUDGED[-1]}.",
        "",
        "### Targets",
        "",
        target_table(found),
    ]
    if found["errors"]:
        lines += ["", "### Error", "", error_table(found), ""]
        lines.append(
            "The norm of the error against float64 over that of torch's bf16 linear on the dequantized weight; the "
            f"largest of batches {listing(found['errors'], 'batch')} and instruction sets "
            f"{listing(found['errors'], 'isa')}."
        )
    for run in found["runs"]:
        lines += run_lines(run, found["formats"])
    return "\n".join(lines) + "\n"


def run_lines(run: Run, formats: Sequence[str]) -> list[str]:
    """The part of one number of threads."""
    rounds = [len(cell["seconds"][TORCH]) for cell in run["cells"]] or [0]
    lines = ["", f"### {words(run)}", "", "#### Speed relative to torch's bf16 linear", "", speed_table(run, formats)]
    about = f"{span(rounds)} rounds per cell."
    if (spread := results.spread(run)) is not None:
        about += f" The quartiles of a contender's times lie {spread:.1%} of their median apart, in the median cell."
    if quiet := run.get("quiet"):
        about += f" Other processes used {quiet['others']:.2f} cores, the hypervisor took {quiet['stolen']:.2f}."
    lines += ["", about]
    lines += [f"\n**Doubtful:** {reason}." for reason in results.doubts(run)]
    lines += [f"\n`{title}` was not measured: {reason}." for title, reason in run["refused"].items()]
    if run["missing"]:
        lines.append(f"\nvLLM's operators were not measured: {run['missing']}.")
    if single := single_table(run, formats):
        read = results.read_speed(run) or 0.0
        lines += ["", "#### Batch 1", "", f"Read bandwidth {read:.1f} GB/s ({run['bandwidth']['method']}).", "", single]
        lines += ["", "GB/s are bytes of weight; vs is how many times as fast as that contender."]
    if isa := isa_table(run, formats):
        lines += ["", "#### Instruction sets at batch 1, relative to torch's bf16 linear", "", isa]
    return lines


def listing(found: Sequence[Mapping[str, Any]], key: str) -> str:
    """The values of a key, in their order."""
    return ", ".join(str(value) for value in dict.fromkeys(entry[key] for entry in found))


def span(numbers: Sequence[int]) -> str:
    """`9 to 48`, or `9`."""
    return f"{min(numbers)} to {max(numbers)}" if min(numbers) < max(numbers) else str(numbers[0])


def words(run: Run) -> str:
    """`1 thread`, `2 threads`."""
    return f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}"
