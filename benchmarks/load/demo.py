"""`make bench`: the demo model served three ways, measured one after another, written to docs/benchmarks.md."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from benchmarks.report import machine, machine_line
from quantserve.cli.sources import choose_target, load_sources, outcomes
from quantserve.plugins.registry import Registry
from quantserve_bench import markdown
from quantserve_bench.program import expected_of
from quantserve_bench.prompts import Lengths
from quantserve_bench.results import write
from quantserve_bench.served import choose_models, served_models
from quantserve_bench.server import Server
from quantserve_bench.session import Measurement, Settings, measure_models, scaled
from quantserve_bench.workloads import WORKLOADS

ROOT: Final = Path(__file__).resolve().parents[2]
DOCS: Final = ROOT / "docs"
SCALE: Final = 0.27
"""The demo takes 512 tokens; lengths of the 2023 workload times this fit."""
CONCURRENCIES: Final = (1, 4, 16)


def table_settings(requests: int) -> Settings:
    """The 2023 workload, shortened to the demo's context."""
    workload = replace(scaled(WORKLOADS["rayllm-2023"], SCALE), requests=requests)
    return Settings(workload, concurrencies=(workload.concurrency,), warmup=10)


def sweep_settings(requests: int) -> Settings:
    """Exact lengths over several concurrencies."""
    fixed = replace(WORKLOADS["random"], input_tokens=Lengths(128), output_tokens=Lengths(64), requests=requests)
    return Settings(fixed, concurrencies=CONCURRENCIES, warmup=10)


def run(out: Path, quick: bool = False) -> None:
    """Measure all models and write results to `out` and the page to docs/.

    Args:
        out: folder for the full results; replaced.
        quick: few requests, to see that all works; the page is written to `out` as well, not to docs/.
    """
    first, second = (table_settings(20), sweep_settings(8)) if quick else (table_settings(300), sweep_settings(96))
    in_rounds: list[Measurement] = []
    swept: list[Measurement] = []
    app = load_sources([str(ROOT / "models" / "demo.yaml")], None, None, None, False)
    composed = {
        r.model.model_id: r.composition
        for r in outcomes(app.models, Registry.load(), choose_target(None))
        if r.composition
    }
    for model in app.models:
        with tempfile.TemporaryDirectory(prefix="quantserve-bench-") as folder:
            print(f"starting {model.model_id}", flush=True)
            with Server([model], Path(folder)) as target:
                served = choose_models(served_models(target), [model.model_id])
                for settings, done in ((first, in_rounds), (second, swept)):
                    print(f"  {settings.workload.name}", flush=True)
                    measure_models(target, served, settings, expect=expected_of(composed), done=done)
    out.mkdir(parents=True, exist_ok=True)
    write(out / "rayllm-2023", in_rounds, first)
    write(out / "sweep", swept, second)
    docs = out if quick else DOCS
    for source, name in (("rayllm-2023/methods", "bench-methods"), ("rayllm-2023/latency", "bench-latency"),
                         ("sweep/throughput", "bench-throughput")):  # fmt: skip
        shutil.copyfile(out / f"{source}.svg", docs / f"{name}.svg")
    (docs / "benchmarks.md").write_text(page(in_rounds, first, swept, second))
    print(f"wrote {docs / 'benchmarks.md'}; everything else is in {out}")


def page(in_rounds: Sequence[Measurement], first: Settings, swept: Sequence[Measurement], second: Settings) -> str:
    """docs/benchmarks.md."""
    parts = [
        "# The demo model under load",
        "Written by `make bench`: [models/demo.yaml](../models/demo.yaml), one model after another through "
        f"`quantserve serve` on {machine_line(machine())}. The client runs on the same cores. A model of this size "
        "waits for the engine's own work more than for its weights, so the methods differ less than on larger ones, "
        "and unpacking its small matrices for a prompt costs more than it saves: [performance.md](performance.md) has "
        "models that gain.",
        "[bench.md](bench.md) says what each metric is and how to measure your own models.",
        "## As in RayLLM's tables",
        f"The workload of 2023 with all lengths times {SCALE:g}, because the demo takes 512 tokens: "
        f"{first.workload.requests} requests in rounds of 10. Means per request; ITL is E2E / output tokens, TTFT "
        "included; throughput is per user.",
        markdown.seed_table(in_rounds),
        "![The three methods side by side](bench-methods.svg)",
        "![Distribution of latencies](bench-latency.svg)",
        "## Expected beside measured",
        "Expected is what `quantserve profile` predicts for the lengths and the concurrency that were measured.",
        markdown.table(markdown.VERDICT_COLUMNS, markdown.verdict_rows(in_rounds), left=3),
        _notes(in_rounds),
        "## Over concurrency",
        f"128 random tokens in, exactly 64 out, {second.workload.requests} requests per point.",
        "![Throughput against concurrency](bench-throughput.svg)",
        markdown.table(SWEEP_COLUMNS, sweep_rows(swept), left=2),
        markdown.table(markdown.VERDICT_COLUMNS, markdown.verdict_rows(swept), left=3),
        _notes(swept),
    ]
    warnings = markdown.warning_lines([*in_rounds, *swept])
    if warnings:
        parts += ["## Warnings", "\n".join("- " + line for line in warnings)]
    return "\n\n".join(part for part in parts if part) + "\n"


SWEEP_COLUMNS: Final = ("Model", "Load", "TTFT (ms)", "TPOT (ms)", "E2E (ms)", "tok/s per user", "tok/s of all users",
                        "requests on their way", "client, share of a core")  # fmt: skip


def sweep_rows(measurements: Sequence[Measurement]) -> list[list[str]]:
    """One row per model and concurrency."""
    rows = []
    for m in measurements:
        means = [markdown.number(m.measured.mean(key)) for key in ("ttft", "tpot", "e2e", "tokens_per_s")]
        totals = m.measured.totals
        held = f"{totals['concurrency_mean']:.1f}"
        all_users = markdown.number(totals["output_tokens_per_s"])
        rows.append([m.served.id, m.load_label, *means, all_users, held, f"{totals['client_share']:.1%}"])
    return rows


def _notes(measurements: Sequence[Measurement]) -> str:
    return "\n".join("- " + note for note in dict.fromkeys(map(markdown.expected_note, measurements)) if note)
