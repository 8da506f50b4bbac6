"""The command line: `python -m benchmarks.gpu`."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benchmarks.gpu as package
from benchmarks import program, report
from benchmarks.console import BEGAN, BUILD, BenchError, say
from benchmarks.decode.__main__ import numbers
from benchmarks.gpu import formats, results
from benchmarks.kernels import shapes

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
PARTS = ("decode", "kernels")  # in the order of measuring: the short one first


@dataclass(frozen=True)
class Settings:
    """What to measure; `seconds` is what the whole run may take."""

    parts: tuple[str, ...]
    shapes: tuple[shapes.Shape, ...]
    batches: tuple[int, ...]
    formats: tuple[str, ...]
    rounds: int
    context: int
    seconds: float


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(package.__doc__ or "").partition("\n")[0]
    )
    out.add_argument("--parts", default=",".join(PARTS), metavar="decode,kernels", help="default both")
    out.add_argument("--models", default="7b", metavar="7b,13b,70b", help="linears of Llama-2, or all; default 7b")
    out.add_argument("--batches", type=numbers, default=BATCHES, metavar="1,8,64",
                     help="of the linears; default 1 to 128 by doubling, 512 and 2048")  # fmt: skip
    out.add_argument("--formats", metavar="A,B", help="or all; default all but nf4; an unknown name lists them")
    out.add_argument("--rounds", type=int, default=7, help="of the linears; default 7")
    out.add_argument("--context", type=int, default=512, help="tokens the decode loop attends to; default 512")
    out.add_argument("--seconds", type=float, default=80.0, help="end after so long with what there is; default 80")
    out.add_argument("--render", action="store_true", help="measure nothing: draw OUT/results.json anew")
    out.add_argument("--out", type=Path, default=BUILD / "gpu", help="default build/bench/gpu")
    return out


def settings_of(options: argparse.Namespace) -> Settings:
    """What to measure.

    Raises:
        BenchError: an unknown name or a number out of range; says what is known.
    """
    wanted = [part.strip() for part in options.parts.split(",") if part.strip()]
    unknown = [part for part in wanted if part not in PARTS]
    if unknown or not wanted:
        raise BenchError(f"unknown part {', '.join(unknown) or '(none given)'}; known: {', '.join(PARTS)}")
    if options.rounds < 1 or options.context < 1 or not options.seconds > 0:
        raise BenchError("--rounds and --context are 1 or more, --seconds is more than 0")
    return Settings(
        parts=tuple(part for part in PARTS if part in wanted),
        shapes=tuple(shapes.choose(options.models)),
        batches=tuple(options.batches),
        formats=tuple(formats.choose(options.formats)),
        rounds=options.rounds,
        context=options.context,
        seconds=options.seconds,
    )


def benchmark(options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measure; returns what results.json holds, which is written after every cell.

    Raises:
        BenchError: no GPU, an option that does not fit, or a wrong product.
    """
    settings = settings_of(options)
    # Here, because they import torch, which --render and --help do without.
    from benchmarks.gpu import decode, device, linears
    from benchmarks.gpu.state import OutOfTimeError, State

    with device.own_stream():
        if not report.can_plot():
            say(f"there will be tables but no plot: {report.PLOT_FIX}")
        found: dict[str, Any] = {
            "command": command,
            "date": datetime.date.today().isoformat(),
            "machine": report.machine(),
            "seconds": settings.seconds,
            "cache_bytes": device.cache_bytes(),
            "caches": linears.CACHES,
            "copy_bytes_per_s": None,
            "formats": settings.formats,
            "decode": None,
            "cells": [],
            "errors": [],
            "refused": {},
            "stopped": False,
        }
        state = State(options.out / "results.json", found, BEGAN + settings.seconds)
        found["copy_bytes_per_s"] = state.attempt("copy bandwidth", device.copy_speed)
        state.save()
        say(f"{found['machine'].get('gpu', 'GPU')}: copies {(found['copy_bytes_per_s'] or 0.0) / 1e9:.0f} GB/s")
        try:
            if "decode" in settings.parts:
                loop = (decode.LLAMA_7B, settings.context, device.DEVICE)
                state.attempt("the rest of the decode loop", decode.measure, state, *loop)
            if "kernels" in settings.parts:
                given = (settings.shapes, settings.batches, settings.formats, settings.rounds, device.DEVICE)
                state.attempt("the rest of the linears", linears.measure, state, *given)
        except OutOfTimeError:
            found["stopped"] = True
            say(f"{settings.seconds:g} s are over")
        state.save()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns an exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    command = shlex.join(["python", "-m", "benchmarks.gpu", *arguments])
    return program.run(
        "gpu",
        options,
        lambda: benchmark(options, command),
        results.markdown,
        results.plot,
        "finished cells are in results.json",
    )


if __name__ == "__main__":
    sys.exit(main())
