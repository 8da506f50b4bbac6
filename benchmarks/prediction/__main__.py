"""The command line: `python -m benchmarks.prediction`. Needs a calibration (`quantserve calibrate --engine`)."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.console import BUILD, ROOT, BenchError, say, shown
from benchmarks.decode import checkpoints, engine
from benchmarks.decode.pool import choose_cores
from benchmarks.decode.shapes import FULL, Shape
from benchmarks.decode.variants import VARIANTS, Variant
from quantserve.checkpoint import open_checkpoint
from quantserve.checks.memory import estimate
from quantserve.config import load_object
from quantserve.planning.expectation import expectation
from quantserve.plugins.registry import Registry
from quantserve.predict.calibration import find_calibration
from quantserve.predict.machine import threads_of
from quantserve.predict.workload import Workload
from quantserve.target import this_cpu

SMALL = Shape("llama-0.2b", hidden=1024, intermediate=2816, layers=12, heads=8, kv_heads=4, vocab=32000)
SIZES = {shape.name: shape for shape in (SMALL, FULL)}
METHODS = {"bf16": "fp16", "awq": "awq", "squeezellm": "squeezellm"}
METRICS = ("ttft_ms", "tpot_ms", "tokens_per_s")
NAMES = {"ttft_ms": "TTFT ms", "tpot_ms": "TPOT ms", "tokens_per_s": "tok/s"}
TOLERANCE = 0.2
KV_GIB = 1
WAIT_S = 1800


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(prog="python -m benchmarks.prediction", description=__doc__)
    out.add_argument("--sizes", default=",".join(SIZES), help="comma list; default both")
    out.add_argument("--methods", default=",".join(METHODS), help="comma list; default bf16,awq,squeezellm")
    out.add_argument("--concurrency", default="1,4,16", help="at most 16")
    out.add_argument("--input-tokens", type=int, default=128)
    out.add_argument("--output-tokens", type=int, default=48)
    out.add_argument("--rounds", type=int, default=3)
    out.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: time of the engine's process only")
    out.add_argument("--predict", action="store_true", help="predict only, beside the measurements in --out")
    out.add_argument("--out", type=Path, default=BUILD / "prediction" / "results.json")
    return out


def measured(shape: Shape, variant: Variant, cells: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Cells of one engine, in a process of its own.

    Raises:
        BenchError: it failed.
    """
    checkpoints.make(shape, variant.checkpoint)
    cores = choose_cores(threads_of(this_cpu().cores))
    log = BUILD / "logs" / f"prediction-{shape.name}-{variant.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"{shape.name} {variant.name}: log in {shown(log)}")
    line = [sys.executable, "-m", "benchmarks.prediction.worker", str(shape.checkpoint(variant.checkpoint))]
    line += [json.dumps(dict(variant.engine_args)), json.dumps(cells)]
    environment = engine.environment(cores, variant.plugins, KV_GIB)
    with log.open("w") as errors:
        done = subprocess.run(
            line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, timeout=WAIT_S, check=False
        )
    if done.returncode:
        raise BenchError(f"{variant.name} ended with code {done.returncode}; log: {shown(log)}")
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


def predicted(shape: Shape, variant: Variant, cells: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The same cells, predicted for an engine without HTTP."""
    folder = shape.checkpoint(variant.checkpoint)
    kwargs = {"quantization": METHODS[variant.name], "max_num_seqs": 16, "max_num_batched_tokens": 2048}
    value = {
        "engine_config": {
            "model_id": "m",
            "hf_model_id": str(folder),
            "max_total_tokens": engine.MAX_LENGTH,
            "engine_kwargs": {**kwargs, "dtype": "bfloat16"},
        }
    }
    model = load_object({"models": [value]}, "benchmark").models[0]
    checkpoint, target = open_checkpoint(str(folder)), this_cpu()
    memory, _ = estimate(checkpoint, model, target)
    made = expectation(Registry.load().find_method(METHODS[variant.name]), checkpoint, model, target, memory)
    assert made is not None
    inside = dataclasses.replace(made.machine, engine=dataclasses.replace(made.machine.engine, arrival_s=0.0))
    made = dataclasses.replace(made, machine=inside)
    out = {}
    for users in cells["concurrency"]:
        load = Workload("rounds", cells["input_tokens"], cells["output_tokens"], users, users, rounds=True)
        prediction = made.predict(load)
        out[str(users)] = {name: getattr(prediction, name) for name in METRICS}
    return out


def table(results: Sequence[dict[str, Any]]) -> tuple[str, int, int]:
    """Markdown, the number of cells within the tolerance, and of all."""
    rows, within, count = [], 0, 0
    for result in results:
        for users, seen in result["measured"].items():
            cells = []
            for name in METRICS:
                ratio = result["predicted"][users][name] / seen[name]
                good = abs(ratio - 1) <= TOLERANCE
                within, count = within + good, count + 1
                text = f"{seen[name]:.4g} | {result['predicted'][users][name]:.4g} | {ratio:.2f}"
                cells.append(text if good else f"{text} ✗")
            rows.append(f"| {result['size']} | {result['method']} | {users} | " + " | ".join(cells) + " |")
    head = "".join(f" {NAMES[name]} | predicted | ratio |" for name in METRICS)
    rule = "|---|---|---:|" + "---:|" * (3 * len(METRICS))
    return "\n".join([f"| model | method | clients |{head}", rule, *rows]) + "\n", within, count


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns an exit code."""
    options = parser().parse_args(arguments)
    found = find_calibration(this_cpu())
    if found.calibration is None:
        print(f"prediction: no calibration {found.note}; run `quantserve calibrate --engine` first", file=sys.stderr)
        return 1
    cells = {
        "concurrency": [int(part) for part in options.concurrency.split(",")],
        "input_tokens": options.input_tokens,
        "output_tokens": options.output_tokens,
        "rounds": options.rounds,
        "clock": options.clock,
    }
    results = json.loads(options.out.read_text())["results"] if options.predict else []
    try:
        if options.predict:
            for result in results:
                shape, variant = SIZES[result["size"]], VARIANTS[result["variant"]]
                result["predicted"] = predicted(shape, variant, result["cells"])
        else:
            for size in options.sizes.split(","):
                for name in options.methods.split(","):
                    shape, variant = SIZES[size], VARIANTS[name]
                    seen = measured(shape, variant, cells)
                    results.append(
                        {
                            "size": size,
                            "variant": name,
                            "method": METHODS[name],
                            "cells": cells,
                            "measured": seen,
                            "predicted": predicted(shape, variant, cells),
                        }
                    )
                    write(options.out, results, found.calibration.to_json())
    except BenchError as error:
        print(f"prediction: {error}", file=sys.stderr)
        return 1
    write(options.out, results, found.calibration.to_json())
    text, within, count = table(results)
    options.out.with_name("table.md").write_text(text)
    print(text)
    print(f"{within} of {count} within {TOLERANCE:.0%}; load of the last minute {os.getloadavg()[0]:.2f}")
    return 0


def write(path: Path, results: Sequence[dict[str, Any]], calibration: dict[str, Any]) -> None:
    """Everything there is so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"date": datetime.date.today().isoformat(), "machine": report.machine(), "calibration": calibration}
    path.write_text(json.dumps({**about, "results": list(results)}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
