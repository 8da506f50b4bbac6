"""Writes the result files: to a temporary folder, which is renamed when it is complete."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import gmtime, strftime
from typing import Any, Final

from quantserve import __version__
from quantserve.errors import UsageError
from quantserve_bench import llmperf, markdown
from quantserve_bench.metrics import METRICS, TOTALS
from quantserve_bench.page import page
from quantserve_bench.peers import vllm_result
from quantserve_bench.plots import Plot, draw
from quantserve_bench.session import Measurement, Settings
from quantserve_bench.statistics import PERCENTILES
from quantserve_bench.timing import timing_of

REQUEST_COLUMNS: Final = (
    "model", "load", "number", "scheduled_s", "start_s", "end_s", "queue_s", "connect_s", "first_byte_s", "ttft_s",
    "first_content_s", "tpot_s", "e2e_s", "input_tokens", "output_tokens", "cached_tokens", "counted_by", "events",
    "reads", "finish_reason", "status", "error_code", "error_message",
)  # fmt: skip


def check_folder(out: Path, overwrite: bool) -> None:
    """Check the output folder before the measurement.

    Raises:
        UsageError: it is not empty, or cannot be created.
    """
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UsageError(f"--out {out}: the folder is not empty\n  fix: give another --out, or --overwrite")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: not a folder\n  fix: give another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from None
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"--out {out}: no permission to write to {out.parent}\n  fix: give another --out")


def write(
    out: Path,
    measurements: Sequence[Measurement],
    settings: Settings,
    metadata: Mapping[str, str] | None = None,
    *,
    plots: bool = True,
) -> dict[str, Any]:
    """Write all files; returns the content of ``results.json``.

    ``results.json``, ``requests.csv``, ``summary.csv``, ``report.md``, ``report.html``, plots as .svg and .png if
    matplotlib is installed, and a folder with llmperf's two files for each measurement.

    Args:
        out: replaced when it exists.
        measurements: at least one.
        settings: what was measured.
        metadata: from the user, written to every JSON file.
        plots: draw them, where matplotlib is installed.
    """
    metadata = metadata or {}
    values = document(measurements, settings, metadata)
    drawn = draw(measurements) if plots else []
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / "whole"
        folder.mkdir()
        _json(folder / "results.json", values)
        (folder / "summary.csv").write_text(summary_csv(measurements))
        (folder / "requests.csv").write_text(requests_csv(measurements))
        for plot in drawn:
            (folder / f"{plot.name}.svg").write_text(plot.svg)
            (folder / f"{plot.name}.png").write_bytes(plot.png)
        shown = [(plot.title, f"{plot.name}.svg") for plot in drawn]
        (folder / "report.md").write_text(markdown.report(measurements, values["settings"], shown))
        (folder / "report.html").write_text(_page(measurements, values, drawn))
        for name, measurement in zip(folder_names(measurements), measurements, strict=True):
            (folder / name).mkdir()
            base = folder / name / llmperf.base_name(measurement.served.id, settings)
            _json(Path(f"{base}_summary.json"), llmperf.summary(measurement, settings, metadata))
            _json(Path(f"{base}_individual_responses.json"), llmperf.individual_responses(measurement))
        if out.exists():
            out.rename(Path(temporary) / "old")
        folder.rename(out)
    return values


def _page(measurements: Sequence[Measurement], values: Mapping[str, Any], plots: Sequence[Plot]) -> str:
    machine = values["client"]
    words = f"{machine['os']}, {machine['cpus']} CPUs, Python {machine['python']}; {values['began']}"
    return page(measurements, values["settings"], words, plots)


def document(measurements: Sequence[Measurement], settings: Settings, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Settings, versions, and every measurement in numbers."""
    return {
        "quantserve": __version__,
        "began": strftime("%Y-%m-%dT%H:%M:%SZ", gmtime(measurements[0].run.unix_time)),
        "client": {
            "os": f"{platform.system()} {platform.machine()}",
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "python": platform.python_version(),
        },
        "metadata": dict(metadata),
        "settings": settings.to_json(),
        "definitions": {
            "metrics": {key: {"unit": metric.unit, "definition": metric.definition} for key, metric in METRICS.items()},
            "totals": {key: {"unit": unit, "definition": text} for key, (unit, text) in TOTALS.items()},
        },
        "measurements": [_measurement(measurement) for measurement in measurements],
    }


def _measurement(measurement: Measurement) -> dict[str, Any]:
    served = measurement.served
    return {
        "model": served.id,
        "method": served.method,
        "bits": served.bits,
        "server": dict(served.server),
        "load": {
            "shape": type(measurement.load).__name__.lower(),
            "label": measurement.load_label,
            "level": measurement.level,
        },
        "unix_time": measurement.run.unix_time,
        "tokenizer": measurement.tokenizer,
        "warnings": list(measurement.warnings),
        **measurement.measured.to_json(),
        "vllm_bench_serve": vllm_result(measurement.run),
        "expected": measurement.expected,
        "verdicts": [verdict.to_json() for verdict in measurement.verdicts],
    }


def folder_names(measurements: Sequence[Measurement]) -> list[str]:
    """A name for each measurement that a file system takes; all differ."""
    names: list[str] = []
    for measurement in measurements:
        base = re.sub(r"[^\w.-]+", "-", f"{measurement.served.id}-{measurement.load_label}").strip("-.")
        name, again = base, 1
        while name in names:
            again += 1
            name = f"{base}-{again}"
        names.append(name)
    return names


def summary_csv(measurements: Sequence[Measurement]) -> str:
    """One row per measurement and metric, then its totals."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    percentiles = [f"p{percent}" for percent in PERCENTILES]
    rows.writerow(["model", "load", "metric", "unit", "count", "mean", "stddev", "min", *percentiles, "max"])
    for m in measurements:
        for key, summary in m.measured.summaries.items():
            numbers = [summary.mean, summary.stddev, summary.minimum, *summary.percentiles.values(), summary.maximum]
            rows.writerow([m.served.id, m.load_label, key, METRICS[key].unit, summary.count, *numbers])
        for key, value in m.measured.totals.items():
            rows.writerow([m.served.id, m.load_label, key, TOTALS[key][0], "", value])
    return out.getvalue()


def requests_csv(measurements: Sequence[Measurement]) -> str:
    """One row per request; times in seconds, those of events from the request's start, others from the run's."""
    out = io.StringIO()
    rows = csv.DictWriter(out, REQUEST_COLUMNS, lineterminator="\n")
    rows.writeheader()
    for m in measurements:
        for result in m.run:
            row: dict[str, Any] = {
                "model": m.served.id,
                "load": m.load_label,
                "number": result.number,
                "scheduled_s": result.scheduled - m.run.began,
                "start_s": result.start - m.run.began,
                "end_s": result.end - m.run.began,
                "status": result.status,
                "finish_reason": result.finish_reason,
                "connect_s": result.connect_s,
            }
            if result.failure:
                row |= {"error_code": result.failure.code, "error_message": result.failure.message}
            else:
                timing = timing_of(result)
                row |= {name: getattr(timing, name) for name in REQUEST_COLUMNS if hasattr(timing, name)}
                row["counted_by"] = timing.source
            rows.writerow(row)
    return out.getvalue()


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
