"""The model card: README.md of a checkpoint that was quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantserve.checkpoint.quality import MeasuredQuality
from quantserve_quantize.quantizer import FEWEST


def card(report: Mapping[str, Any], quality: MeasuredQuality | None = None) -> str:
    """Markdown with what was done, what was measured, and the linears with the largest errors."""
    options = ", ".join(f"{name} {value}" for name, value in report["options"].items())
    lines = [
        f"# {report['source']} in {report['method']}",
        "",
        f"Made by `quantserve quantize` ({report['versions']['quantserve']}) from `{report['source']}`: "
        f"{options or 'no options'}. "
        f"{report['bits_per_weight']:.2f} bits per weight of the {len(report['layers'])} quantized linears.",
        "",
    ]
    if found := report.get("calibration"):
        lines += [f"Calibrated with {found['samples']} samples of {found['length']} tokens of `{found['text']}`.", ""]
    if "few_tokens" in report:
        lines += [few_tokens(report), ""]
    if quality:
        lines += [
            f"Measured on {quality.measured_on} ({quality.date}):",
            "",
            "| | perplexity | over the reference | KL mean | same top |",
            "|---|---:|---:|---:|---:|",
            f"| {quality.reference} | {quality.baseline:.3f} | 1 | | |",
            f"| this model | {quality.perplexity:.3f} | {quality.increase + 1:.4f} | {quality.kl_mean:.4f} "
            f"| {_percent(quality.same_top)} |",
            "",
        ]
    rows = sorted(report["layers"].items(), key=lambda row: -(row[1]["output_error"] or row[1]["weight_error"]))
    lines += [
        "The linears with the largest errors, relative to weight and output:",
        "",
        "| linear | weight | output |",
        "|---|---|---|",
        *(
            f"| `{name}` | {_percent(row['weight_error'])} | {_percent(row['output_error'])} |"
            for name, row in rows[:10]
        ),
        "",
        "`quantserve.json` has all of them, and the versions and hashes from which the files can be made again.",
        "",
    ]
    return "\n".join(lines)


def few_tokens(report: Mapping[str, Any]) -> str:
    """Which experts had no statistics of their own."""
    few = report["few_tokens"]
    experts = sum("tokens" in layer for layer in report["layers"].values())
    return (
        f"{len(few)} of {experts} linears of experts saw fewer than {FEWEST} tokens of the calibration text and were "
        f"weighed by the inputs of all experts of their layer. First: `{few[0]}`. A longer text reaches more experts."
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"
