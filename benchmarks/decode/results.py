"""From measured values to medians, ratios, tables and the plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report
from benchmarks.decode.variants import REFERENCE, VARIANTS

Run = Mapping[str, Any]


def medians(run: Run) -> dict[str, dict[str, float]]:
    """Variant -> column -> median over the rounds, in the column's unit."""
    return {
        name: {key: median(values) for key, values in columns.items() if values}
        for name, columns in run["values"].items()
    }


def ratios(run: Run) -> dict[str, dict[str, float]]:
    """Variant -> column -> how many times as fast as bf16: the median of the ratios within a round."""
    reference = run["values"].get(REFERENCE, {})
    out: dict[str, dict[str, float]] = {}
    for name, columns in run["values"].items():
        begins = run.get("begins", {}).get(name, {})
        for key, values in columns.items():
            pairs = list(zip(values, reference.get(key, ())[begins.get(key, 0) :], strict=False))
            if pairs:
                smaller_is_better = run["units"][key] == "ms"
                speeds = [theirs / own if smaller_is_better else own / theirs for own, theirs in pairs]
                out.setdefault(name, {})[key] = median(speeds)
    return out


def spread(run: Run) -> tuple[float, str]:
    """The largest distance of two rounds relative to their median, and where it was."""
    worst = (0.0, "")
    for name, columns in run["values"].items():
        for key, values in columns.items():
            if len(values) > 1:
                worst = max(worst, ((max(values) - min(values)) / median(values), f"{name}, {key}"))
    return worst


def speed_table(run: Run) -> str:
    """One row per variant: milliseconds or tokens per second, and the ratio to bf16."""
    keys = list(run["units"])
    middle, ratio = medians(run), ratios(run)

    def cell(name: str, key: str) -> str:
        if key not in middle.get(name, {}):
            return "-"
        value = middle[name][key]
        times = ratio.get(name, {}).get(key)
        return f"{value:.{0 if value >= 100 else 1}f}" + ("" if times is None else f" ({times:.2f}x)")

    header = ["", *(title(key, run["units"][key]) for key in keys)]
    names = [name for name in VARIANTS if name in middle or name in run["errors"]]
    return report.markdown_table(header, [[name, *(cell(name, key) for key in keys)] for name in names])


def title(key: str, unit: str) -> str:
    """A column's heading."""
    what, _, number = key.partition(" ")
    return f"{what} {number} tokens, {unit}" if what == "prefill" else f"{what} batch {number}, {unit}"


def load_table(results: Mapping[str, Any], run: Run) -> str:
    """One row per variant: seconds and memory of loading the weights, medians over the load rounds."""
    rows = []
    for name in VARIANTS:
        started = run["start"].get(name)
        loads: Sequence[Mapping[str, float]] = results["loads"].get(name) or ([started] if started else [])
        if not loads:
            continue

        def middle(key: str, loads: Sequence[Mapping[str, float]] = loads) -> float:
            return median(load[key] for load in loads)

        weights = results["checkpoint_bytes"][name]
        own, mapped, kept = (middle(key) for key in ("peak_extra_anonymous", "peak_extra", "kept_anonymous"))
        rows.append(
            [
                name,
                f"{weights / 1e6:.0f}",
                f"{middle('load_s'):.1f}",
                f"{own / 1e6:.0f} ({own / weights:.2f}x)",
                f"{mapped / 1e6:.0f} ({mapped / weights:.2f}x)",
                f"{kept / 1e6:.0f}",
                f"{started['process_s']:.0f}" if started else "-",
            ]
        )
    header = [
        "",
        "checkpoint, MB",
        "load, s",
        "peak RAM, MB",
        "with mapped file, MB",
        "kept, MB",
        "process to ready, s",
    ]
    return report.markdown_table(header, rows)


def markdown(results: Mapping[str, Any]) -> str:
    """The whole report."""
    shape = results["shape"]
    total, linear = shape["parameters"] / 1e6, shape["linear_parameters"] / 1e6
    lines = [
        f"Synthetic Llama of {total:.1f}M parameters ({linear:.1f}M in the linears): "
        f"{shape['layers']} layers, hidden {shape['hidden']}, intermediate {shape['intermediate']}, "
        f"{shape['heads']} heads, {shape['kv_heads']} KV heads, vocabulary {shape['vocab']}. "
        f"vLLM {'eager' if results['eager'] else 'compiled'}, activations bfloat16.",
        "",
        f"{results['date']}; {report.machine_line(results['machine'])}"
        + (f"; {results['peer']}" if results.get("peer") else ""),
        "",
        f"    {results['command']}",
    ]
    for run in results["runs"]:
        worst, where = spread(run)
        busy = {name: median(shares) for name, shares in run["busy"].items() if shares}
        waiting = sum(run.get("idle_cores", {}).values())
        groups = len({max(begun.values(), default=0) for begun in run.get("begins", {}).values()})
        lines += ["", f"### {threads_in_words(run)}", "", speed_table(run), ""]
        lines.append(
            f"Medians of {run['rounds']} rounds; in brackets the speed relative to {REFERENCE} in the same round. "
            + (f"The engines ran in {groups} groups, {REFERENCE} in each. " if groups > 1 else "")
            + f"Largest spread between rounds: {worst:.0%} ({where or 'one round'}). "
            f"The engines got {min(busy.values(), default=math.nan):.0%} or more of their cores' time; "
            f"while waiting, all together used {waiting:.1%} of one core."
        )
        for name, reason in run["errors"].items():
            lines.append(f"\n`{name}` was not measured: {reason}")
    if results["runs"]:
        lines += ["", "### Loading", "", load_table(results, results["runs"][0])]
        lines += [
            "",
            "Peak RAM is what loading the weights added at most, without and with the mapped pages of the checkpoint, "
            "which the kernel can drop. Medians of "
            f"{max(map(len, results['loads'].values()), default=1)} loads from a warm file cache; "
            "`process to ready` is the engine of the table above, imports and compilation included.",
        ]
    return "\n".join(lines) + "\n"


def threads_in_words(run: Run) -> str:
    """`1 thread`, `2 threads`."""
    return f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}"


def plot(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Bars of the ratios to bf16, a figure per number of threads; the PNG files written.

    Raises:
        report.PlotError: matplotlib is not installed.
    """
    paths = []
    for run in results["runs"]:
        ratio = ratios(run)
        if not ratio:
            continue
        name = "decode" if len(results["runs"]) == 1 else f"decode-{run['threads']}t"
        groups = [title(key, "").removesuffix(", ").replace(" ", "\n", 1) for key in run["units"]]
        series = {
            variant: [ratio[variant].get(key, math.nan) for key in run["units"]]
            for variant in VARIANTS
            if variant in ratio and variant != REFERENCE
        }
        heading = f"Speed relative to vLLM {REFERENCE}, {shape_in_words(results)}, {threads_in_words(run)}"
        report.grouped_bars(folder / f"{name}.png", heading, groups, series, f"times as fast as {REFERENCE}")
        paths.append(folder / f"{name}.png")
    return paths


def shape_in_words(results: Mapping[str, Any]) -> str:
    """`0.84B Llama`, `2.6M Llama`."""
    count = results["shape"]["parameters"]
    return f"{count / 1e9:.2f}B Llama" if count > 1e8 else f"{count / 1e6:.1f}M Llama"
