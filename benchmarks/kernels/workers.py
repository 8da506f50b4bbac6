"""The parent's side: one process that measures at a time, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.console import BUILD, ROOT, BenchError, shown
from benchmarks.decode.engine import environment
from benchmarks.decode.pool import choose_cores

STOP_SECONDS = 10.0
LOG = BUILD / "logs" / "kernels.log"


def ask(command: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Start a process on the first `threads` cores, pass on every piece it sends, and end it whatever happens.

    Raises:
        BenchError: it failed; says why and where its log is.
    """
    cores = choose_cores(command["threads"])
    LOG.parent.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-m", "benchmarks.kernels.worker", json.dumps(command)]
    settings = {**environment(cores, (), 1), "VLLM_LOGGING_LEVEL": "ERROR"}
    with LOG.open("w") as log:
        process = subprocess.Popen(
            line, cwd=ROOT, env=settings, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True
        )
    os.sched_setaffinity(process.pid, cores)
    assert process.stdout is not None
    ended = False
    try:
        for text in process.stdout:
            piece = json.loads(text)
            if piece["kind"] == "failed":
                raise BenchError(f"{piece['error']}; log: {shown(LOG)}")
            ended = ended or piece["kind"] == "ended"
            yield piece
        if not ended:
            raise BenchError(f"the measuring process ended early, exit code {process.wait()}; log: {shown(LOG)}")
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
