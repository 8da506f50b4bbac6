"""Start everything once, then measure cell by cell, variant beside variant, round after round."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.console import BenchError, say
from benchmarks.decode import peer
from benchmarks.decode.pool import KV_GIB, Pool, choose_cores
from benchmarks.decode.shapes import GGUF, Shape, size
from benchmarks.decode.variants import REFERENCE, Variant

DECODE_PROMPT = 32
OVERHEAD_GIB = 0.9  # a Python process with vLLM imported, and its buffers


@dataclass(frozen=True)
class Settings:
    """What a run measures; the command line in short."""

    shape: Shape
    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    rounds: int
    load_rounds: int
    steps: int
    seconds: float
    eager: bool
    may_build: bool


@dataclass(frozen=True)
class Cell:
    """One column: what is measured, and how to ask for it."""

    key: str
    unit: str
    command: dict[str, Any]
    warm_up: dict[str, Any]


def cells(settings: Settings) -> list[Cell]:
    """The columns: prefill by prompt length, then decode by batch."""
    out = []
    for tokens in settings.prompts:
        command = {"do": "prefill", "tokens": tokens}
        out.append(Cell(f"prefill {tokens}", "ms", command, command))
    for batch in settings.batches:
        command = {"do": "decode", "batch": batch, "prompt": DECODE_PROMPT}
        full = {**command, "steps": settings.steps, "seconds": settings.seconds}
        out.append(Cell(f"decode {batch}", "tok/s", full, {**command, "steps": 2, "seconds": 1.0}))
    return out


def prepare(variants: Sequence[Variant], settings: Settings, errors: dict[str, str]) -> str | None:
    """Make the checkpoints and llama.cpp; a peer that cannot be built lands in `errors`. Returns its version."""
    from benchmarks.decode import checkpoints

    found = None
    for variant in variants:
        if variant.checkpoint not in GGUF:
            checkpoints.make(settings.shape, variant.checkpoint)
            continue
        try:
            found = peer.install(settings.may_build)
            checkpoints.make(settings.shape, "bf16")
            peer.make(settings.shape, variant.checkpoint)
        except BenchError as error:
            errors[variant.name] = str(error)
            say(f"{variant.name} is left out: {error}")
    return found


def groups(variants: Sequence[Variant], shape: Shape) -> list[list[Variant]]:
    """Variants whose engines fit into memory side by side; the reference is in every group.

    Raises:
        BenchError: one of them does not fit beside the reference.
    """
    needed = {
        variant.name: 1.3 * size(shape.checkpoint(variant.checkpoint)) / 2**30 + KV_GIB + OVERHEAD_GIB
        for variant in variants
    }
    reference = [variant for variant in variants if variant.name == REFERENCE]
    free, out = available_gib(), [list(reference)]
    for variant in variants:
        if variant in reference:
            continue
        if sum(needed[one.name] for one in (*out[-1], variant)) > free:
            out.append(list(reference))
        out[-1].append(variant)
        if (least := sum(needed[one.name] for one in out[-1])) > free:
            names = " and ".join(one.name for one in out[-1])
            raise BenchError(f"{names} side by side need about {least:.0f} GiB, and {free:.0f} are free")
    return [group for group in out if group != reference or len(out) == 1]


def available_gib() -> float:
    """Memory that new processes can have."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    raise BenchError("/proc/meminfo has no MemAvailable")


def measure_loading(
    variants: Sequence[Variant], settings: Settings, cores: Sequence[int], errors: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Start and stop every variant alone, some rounds; what each said about its start."""
    out: dict[str, list[dict[str, Any]]] = {}
    for number in range(settings.load_rounds):
        for variant in variants:
            if variant.name in errors:
                continue
            warm_cache(settings.shape.checkpoint(variant.checkpoint))
            try:
                with Pool() as pool:
                    ready = pool.start(variant, settings.shape, cores, eager=True).ready
            except BenchError as error:
                errors[variant.name] = str(error)
                say(f"{variant.name} does not start: {error}")
                continue
            out.setdefault(variant.name, []).append(ready)
            megabytes = ready["peak_extra_anonymous"] / 1e6
            about = f"weights in {ready['load_s']:.1f} s, {megabytes:.0f} MB"
            say(f"load {number + 1}/{settings.load_rounds} {variant.name}: {about}")
    return out


def warm_cache(path: Path) -> None:
    """Read a checkpoint once, so that every load finds it in memory."""
    for file in path.glob("*.safetensors") if path.is_dir() else (path,):
        with file.open("rb") as stream:
            while stream.read(2**24):
                pass


def run(
    threads: int,
    variants: Sequence[Variant],
    settings: Settings,
    errors: dict[str, str],
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """All rounds on so many threads; `save` gets the figures so far after every round.

    Engines that do not fit into memory together run in groups. `begins` has for every variant and cell how many values
    of the reference are older than the variant's group.

    Raises:
        BenchError: too many threads or too little memory.
    """
    cores = choose_cores(threads)
    columns = cells(settings)
    left = [variant for variant in variants if variant.name not in errors]
    result: dict[str, Any] = {
        "threads": threads,
        "units": {cell.key: cell.unit for cell in columns},
        "values": {variant.name: {cell.key: [] for cell in columns} for variant in left},
        "begins": {},
        "busy": {variant.name: [] for variant in left},
        "start": {},
        "idle_cores": {},
        "rounds": 0,
        "errors": errors,
    }
    parts = groups(left, settings.shape)
    for number, part in enumerate(parts):
        if len(parts) > 1:
            say(f"group {number + 1} of {len(parts)}: {', '.join(variant.name for variant in part)}")
        measured = {key: len(values) for key, values in result["values"].get(REFERENCE, {}).items()}
        result["begins"] |= {variant.name: measured for variant in part if variant.name != REFERENCE}
        run_group(part, settings, cores, result, save)
    return result


def run_group(
    variants: Sequence[Variant],
    settings: Settings,
    cores: Sequence[int],
    result: dict[str, Any],
    save: Callable[[dict[str, Any]], None],
) -> None:
    """All rounds with the engines side by side, into `result`."""
    columns, errors = cells(settings), result["errors"]
    with Pool() as pool:
        for variant in variants:
            try:
                worker = pool.start(variant, settings.shape, cores, settings.eager)
                result["start"][variant.name] = worker.ready
                say(f"started {variant.name} in {worker.ready['process_s']:.0f} s; warming it up")
                for cell in columns:
                    worker.ask(cell.warm_up)
            except BenchError as error:
                fail(pool, variant.name, error, errors)
        for worker in pool.workers.values():
            worker.count_from_here()
        began = time.monotonic()
        for number in range(settings.rounds):
            for cell in columns:
                # Every round begins with another variant.
                names = list(pool.workers)
                shift = number % max(1, len(names))
                measure_cell(pool, names[shift:] + names[:shift], cell, result, f"round {number + 1}/{settings.rounds}")
            result["rounds"] = max(result["rounds"], number + 1)
            elapsed = time.monotonic() - began
            result["idle_cores"] |= {
                name: round(worker.idle_cpu() / elapsed, 4) for name, worker in pool.workers.items()
            }
            save(result)


def measure_cell(pool: Pool, names: Sequence[str], cell: Cell, result: dict[str, Any], where: str) -> None:
    """One cell on one variant after the other, into `result`."""
    shown = []
    for name in names:
        worker = pool.workers[name]
        try:
            answer = worker.ask(cell.command)
        except BenchError as error:
            fail(pool, name, error, result["errors"])
            continue
        result["values"][name][cell.key].append(answer["value"])
        result["busy"][name].append(answer["cpu_s"] / (answer["wall_s"] * result["threads"]))
        shown.append(f"{name} {answer['value']:.1f}")
    say(f"{where}, {cell.key}, {cell.unit}: {', '.join(shown)}")


def fail(pool: Pool, name: str, error: BenchError, errors: dict[str, str]) -> None:
    """Note why a variant is out, and end it if it still runs."""
    errors[name] = str(error)
    say(f"{name} is out: {error}")
    if name in pool.workers:
        pool.drop(name)


def other_load() -> float:
    """How many cores others kept busy in the last minute."""
    return os.getloadavg()[0]
