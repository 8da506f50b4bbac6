"""Run all tests in two phases: first beside each other on all cores, then those marked `alone`, one by one.

    .venv/bin/python scripts/run_tests.py [arguments of pytest]

Both phases get the arguments, and the second runs although the first failed, unless -x says otherwise. The exit code is
pytest's: that of the first phase that failed, or 5 when no test was selected at all. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

PASSED, INTERRUPTED, NO_TESTS = 0, 2, 5
"""Exit codes of pytest."""
GIB_A_WORKER = 10
"""Of memory, for a server with three engines."""


def phases() -> dict[str, list[str]]:
    """Phase -> its arguments of pytest."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    workers = max(1, min(len(os.sched_getaffinity(0)), memory // GIB_A_WORKER))
    beside = ["-n", str(workers), "--no-loadscope-reorder"]  # the units and their order are those of conftest.py
    return {"beside": beside, "alone": []}


def ended(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end of pytest, which gets Ctrl-C itself and stops what the tests started; returns its exit code."""
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return process.wait()


def main(arguments: Sequence[str]) -> int:
    """Run the phases; returns an exit code."""
    codes: list[int] = []
    report: list[str] = []
    for phase, options in phases().items():
        began = time.monotonic()
        command = [sys.executable, "-m", "pytest", "--phase", phase, *options, *arguments]
        print(f"$ {shlex.join(command[2:])}", flush=True)
        code = ended(subprocess.Popen(command))
        codes.append(code)
        said = {PASSED: "passed", NO_TESTS: "no test selected"}.get(code, f"failed with exit code {code}")
        report.append(f"{phase}: {said} in {(time.monotonic() - began) / 60:.1f} min")
        if code == INTERRUPTED or (code not in (PASSED, NO_TESTS) and {"-x", "--exitfirst"} & {*arguments}):
            break
    print("\n".join(report), flush=True)
    return next((code for code in codes if code not in (PASSED, NO_TESTS)), min(codes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
