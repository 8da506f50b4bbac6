"""Tables in Markdown: the layout of RayLLM's quantization benchmarks, every metric, expected beside measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from quantserve_bench.metrics import METRICS, TOTALS
from quantserve_bench.session import Measurement

SEED_COLUMNS: Final = (
    "Model",
    "Method",
    "Mean E2E (ms)",
    "Mean TTFT (ms)",
    "Mean ITL (ms/token)",
    "Mean throughput (tok/s)",
)
SEED_KEYS: Final = ("e2e", "ttft", "normalized", "tokens_per_s")
DASH: Final = "-"
WIDEST: Final = 150
"""Characters of a row up to which a table is padded."""


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, whole from 1000 on; a dash for None."""
    if value is None:
        return DASH
    if value == int(value) and abs(value) < 1e6:
        return f"{value:,.0f}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{max(0, digits - 3)}f}"
    return f"{value:.{digits}g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns to the left, the others to the right; padded unless it is too wide."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    if sum(widths) > WIDEST:
        widths = [3] * len(header)

    def line(row: Sequence[str]) -> str:
        padded = (row[i].ljust(widths[i]) if i < left else row[i].rjust(widths[i]) for i in range(len(row)))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *(line(row) for row in cells[1:])])


def method_of(measurement: Measurement) -> str:
    """The method and its bits, as far as the server names them."""
    served = measurement.served
    bits = served.bits if isinstance(served.bits, int) else None
    return (f"{served.method} {bits} bit" if bits and bits < 16 else served.method) or DASH


def seed_rows(measurements: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table as RayLLM published it; a column for the load where there are several."""
    several = len({m.load_label for m in measurements}) > 1
    header = list(SEED_COLUMNS)
    rows = [[m.served.id, method_of(m), *(number(m.measured.mean(key)) for key in SEED_KEYS)] for m in measurements]
    if several:
        header.insert(2, "Load")
        rows = [[*row[:2], m.load_label, *row[2:]] for row, m in zip(rows, measurements, strict=True)]
    return header, rows


def seed_table(measurements: Sequence[Measurement]) -> str:
    """The table as RayLLM published it. E2E, TTFT, E2E / tokens and tok/s per user, means over requests."""
    header, rows = seed_rows(measurements)
    return table(header, rows, left=3 if "Load" in header else 2)


def verdict_rows(measurements: Sequence[Measurement]) -> list[list[str]]:
    """Model, load, metric, expected, measured, ratio, verdict."""
    return [
        [
            m.served.id,
            m.load_label,
            f"{v.label} ({v.unit})" if v.unit not in v.label else v.label,
            number(v.expected),
            number(v.measured),
            f"{v.ratio:.2f}x",
            v.verdict,
        ]
        for m in measurements
        for v in m.verdicts
    ]


VERDICT_COLUMNS: Final = ("Model", "Load", "Metric", "Expected", "Measured", "Measured / expected", "Verdict")


def expected_note(measurement: Measurement) -> str:
    """Where the expected numbers of a model come from, with their caveats; empty when there are none."""
    expected = measurement.expected
    if not expected:
        return ""
    caveats = "".join(f"; {caveat}" for caveat in expected.get("caveats") or ())
    source = f"{expected.get('source')}, {expected.get('conditions')}"
    return f"{measurement.served.id}, {measurement.load_label}: {source}{caveats}"


def metric_rows(measurements: Sequence[Measurement]) -> list[list[str]]:
    """One row per metric and measurement: mean and percentiles."""
    rows = []
    for key, metric in METRICS.items():
        for m in measurements:
            if summary := m.measured.summaries.get(key):
                values = (summary.mean, *(summary.percentiles[p] for p in (50, 90, 99)), summary.maximum)
                name = f"{metric.label} ({metric.unit})" if metric.unit else metric.label
                rows.append([name, m.served.id, m.load_label, *map(number, values)])
    return rows


METRIC_COLUMNS: Final = ("Metric", "Model", "Load", "Mean", "p50", "p90", "p99", "Max")


def total_rows(measurements: Sequence[Measurement]) -> list[list[str]]:
    """One row per total, one column per measurement."""
    return [
        [f"`{key}`" + (f" ({unit})" if unit else ""), *(number(m.measured.totals.get(key)) for m in measurements)]
        for key, (unit, _) in TOTALS.items()
        if any(key in m.measured.totals for m in measurements)
    ]


def definitions(mark: Callable[[str], str] = lambda text: f"`{text}`") -> list[list[str]]:
    """Each metric with its definition and its names elsewhere."""
    return [
        [
            metric.label,
            mark(key),
            metric.definition,
            "; ".join(
                f"{tool}: {name}"
                for tool, name in (("llmperf", metric.llmperf), ("vllm", metric.vllm), ("guidellm", metric.guidellm))
                if name
            )
            or DASH,
        ]
        for key, metric in METRICS.items()
    ]


DEFINITION_COLUMNS: Final = ("Metric", "Key", "Definition", "Elsewhere")


def conditions(measurements: Sequence[Measurement], settings: dict[str, Any]) -> list[str]:
    """What the numbers hold for, a line each."""
    workload = settings["workload"]
    first = measurements[0]
    versions = ", ".join(first.served.server.values()) or "not named"

    def lengths(name: str) -> str:
        spread = f" sd {workload[name]['stddev']:g}" if workload[name]["stddev"] else ""
        return f"{workload[name]['mean']:g}{spread}"

    exact = "exactly" if workload["ignore_eos"] else "at most"
    lines = [
        f"workload {workload['name']}: {workload['requests'] or 'all'} requests, {lengths('input_tokens')} tokens in, "
        f"{exact} {lengths('output_tokens')} out",
        f"warm-up {settings['warmup']} requests, seed {settings['seed']}, "
        + ("unique prompts" if settings["unique"] else "the same prompts every run"),
        f"server version {versions}; prompt lengths by {first.tokenizer or 'estimate'}; output tokens by "
        + ", ".join(sorted({source for m in measurements for source in m.measured.sources}) or ["none"]),
    ]
    if settings["slo"]:
        lines.append("goodput limits " + ", ".join(f"{key} {value:g} ms" for key, value in settings["slo"].items()))
    return lines


def report(measurements: Sequence[Measurement], settings: dict[str, Any], plots: Sequence[tuple[str, str]] = ()) -> str:
    """The whole report.

    Args:
        measurements: at least one.
        settings: as JSON.
        plots: title and file name of each.
    """
    parts = ["# Benchmark", *("- " + line for line in conditions(measurements, settings)), ""]
    parts += [
        "## Means per request",
        "",
        seed_table(measurements),
        "",
        "ITL is E2E / output tokens, TTFT included.",
        "",
    ]
    if rows := verdict_rows(measurements):
        parts += ["## Expected beside measured", "", table(VERDICT_COLUMNS, rows, left=3), ""]
        parts += [*("- " + note for note in dict.fromkeys(map(expected_note, measurements)) if note), ""]
    if warnings := warning_lines(measurements):
        parts += ["## Warnings", "", *("- " + line for line in warnings), ""]
    for title, name in plots:
        parts += [f"![{title}]({name})", ""]
    labels = [f"{m.served.id}, {m.load_label}" for m in measurements]
    parts += ["## Whole run", "", table(("", *labels), total_rows(measurements)), ""]
    parts += ["## Every metric", "", table(METRIC_COLUMNS, metric_rows(measurements), left=3), ""]
    parts += ["## Definitions", "", table(DEFINITION_COLUMNS, definitions(), left=4), ""]
    totals = [[f"`{key}`", definition] for key, (_, definition) in TOTALS.items()]
    parts += [table(("Key", "Definition"), totals, left=2), ""]
    return "\n".join(parts)


def warning_lines(measurements: Sequence[Measurement]) -> list[str]:
    """Warnings with the measurement they belong to."""
    return [f"{m.served.id}, {m.load_label}: {warning}" for m in measurements for warning in m.warnings]
