"""The command line: `python -m benchmarks.load demo|cost|agree`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import benchmarks.load as package
from benchmarks.load import agree, cost, demo
from benchmarks.report import machine, machine_line
from benchmarks.serving.models import small_checkpoint
from quantserve.errors import QuantserveError

BUILD = demo.ROOT / "build" / "bench" / "load"
STREAMS = ((16, 20.0), (64, 20.0), (64, 50.0), (256, 20.0))


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(prog="python -m benchmarks.load", description=package.__doc__)
    out.add_argument("what", choices=["demo", "cost", "agree"])
    out.add_argument("--quick", action="store_true", help="few requests: the figures mean nothing")
    out.add_argument("--checkpoint", type=Path, help="agree: model to serve; default one of 0.1 billion random weights")
    out.add_argument("--prompts", type=int, default=320, help="agree: requests of one run; default 320")
    out.add_argument("--out", type=Path, default=BUILD, help="default build/bench/load")
    return out


def main() -> int:
    """Run one of the three; results as JSON in OUT, tables on the terminal."""
    options = parser().parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        if options.what == "demo":
            demo.run(options.out / "demo", options.quick)
        elif options.what == "cost":
            rows = [cost.measure_cost(streams, rate, 3.0 if options.quick else 20.0) for streams, rate in STREAMS]
            keep(options.out / "cost.json", rows, cost.show(rows))
        else:
            compared = agreement(
                options.checkpoint or small_checkpoint(),
                32 if options.quick else options.prompts,
                1 if options.quick else 3,
            )
            keep(options.out / "agree.json", compared, agree.show(compared))
    except (QuantserveError, agree.PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def agreement(checkpoint: Path, prompts: int, rounds: int) -> dict[str, object]:
    """Serve a checkpoint with vLLM's own server and measure it with both."""
    if not (checkpoint / "config.json").is_file():
        raise agree.PeerError(f"--checkpoint {checkpoint}: no folder with a config.json")
    load = agree.Load(prompts=prompts)
    with tempfile.TemporaryDirectory() as folder, agree.serve(checkpoint, Path(folder)) as target:
        return agree.compare(target, load, checkpoint, Path(folder), rounds)


def keep(path: Path, value: object, text: str) -> None:
    """Print a table, keep its numbers."""
    about = machine()
    path.write_text(json.dumps({"machine": about, "results": value}, indent=2) + "\n")
    print(f"{machine_line(about)}\n\n{text}\n\n{path}")


if __name__ == "__main__":
    sys.exit(main())
