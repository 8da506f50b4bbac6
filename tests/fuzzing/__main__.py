"""``python -m fuzzing [headers] [configs] [pickles] [frames] --count N --seed N``: exits 1 when an input failed."""

from __future__ import annotations

import argparse
import sys

from fuzzing import configs, frames, headers, pickles, run

TARGETS = {target.name: target for target in (headers.TARGET, configs.TARGET, pickles.TARGET, frames.TARGET)}


def main() -> int:
    """Run the targets one after the other."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--count", type=int, default=100_000, help="inputs of each target")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same inputs")
    parser.add_argument("--first", type=int, default=0, help="number of the first input, to see one again")
    options = parser.parse_args()
    if unknown := [name for name in options.targets if name not in TARGETS]:
        parser.error(f"unknown target {unknown[0]!r} (known: {', '.join(TARGETS)})")
    failed = False
    for name in options.targets or TARGETS:
        report = run(TARGETS[name], options.count, options.seed, options.first, progress=True)
        print(f"{name}: {options.count:,} inputs: {report}", flush=True)
        for failure in report.failures[:20]:
            print(failure)
        failed |= bool(report.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
