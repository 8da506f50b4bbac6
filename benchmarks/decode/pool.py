"""The parent's side: worker processes that are started, asked one at a time, and ended by their id."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.console import BUILD, ROOT, BenchError, shown
from benchmarks.decode import engine, formats, peer
from benchmarks.decode.shapes import Shape
from benchmarks.decode.variants import Variant

START_SECONDS = 900.0
ANSWER_SECONDS = 900.0
STOP_SECONDS = 10.0
KV_GIB = 1  # 16 sequences of 1024 tokens of the full shape


class Worker:
    """One started process and the pipe to it.

    Args:
        variant: what it runs.
        shape: of which model.
        cores: ids of the cores it computes on.
        eager: whether vLLM runs without torch.compile.

    Attributes:
        ready: what the worker said about its start.
    """

    def __init__(self, variant: Variant, shape: Shape, cores: Sequence[int], eager: bool) -> None:
        self.name = variant.name
        self.log = BUILD / "logs" / f"{variant.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        model = str(shape.checkpoint(variant.checkpoint))
        if variant.peer:
            line = [str(peer.PYTHON), "-m", "benchmarks.decode.llama", model, str(len(cores))]
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        else:
            planned, variables = formats.planned(Path(model)) if variant.planned else ({}, {})
            arguments = json.dumps({**variant.engine_args, **planned, "enforce_eager": eager})
            line = [sys.executable, "-m", "benchmarks.decode.engine", model, arguments]
            environment = {**variables, **engine.environment(cores, variant.plugins, KV_GIB)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                line, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        os.sched_setaffinity(self.process.pid, cores)
        self.ready: dict[str, Any] = {}
        self.cpu_before = self.asked_cpu_s = 0.0

    def wait_ready(self) -> None:
        """Block until it has started.

        Raises:
            BenchError: it did not; says why.
        """
        began = time.monotonic()
        self.ready = self._answer(START_SECONDS)
        self.ready["process_s"] = time.monotonic() - began

    def ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Raises:
            BenchError: the worker failed or is gone.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise self._died() from error
        answer = self._answer(ANSWER_SECONDS)
        self.asked_cpu_s += answer["cpu_s"]
        return answer

    def count_from_here(self) -> None:
        """Begin to count what `idle_cpu` says."""
        self.cpu_before, self.asked_cpu_s = self.cpu(), 0.0

    def idle_cpu(self) -> float:
        """CPU seconds it used while nobody asked."""
        return max(0.0, self.cpu() - self.cpu_before - self.asked_cpu_s)

    def cpu(self) -> float:
        """CPU seconds of the process so far."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def release(self, hurry: bool = False) -> None:
        """Tell it to end, by closing its pipe; in a hurry by a signal to its id as well."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        if hurry:
            self.process.terminate()

    def stop(self) -> None:
        """Wait until it has ended, and use signals where it does not."""
        self.release()
        for harder in (self.process.terminate, self.process.kill, None):
            try:
                self.process.wait(STOP_SECONDS)
                break
            except subprocess.TimeoutExpired:
                if harder is not None:
                    harder()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            raise BenchError(f"no answer for {seconds:.0f} s; log: {shown(self.log)}")
        line = self.process.stdout.readline()
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{answer['error']}; log: {shown(self.log)}")
        return answer

    def _died(self) -> BenchError:
        code = self.process.wait()
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        said = f": {lines[-1][:200]}" if lines else ""
        return BenchError(f"ended with exit code {code}{said}; log: {shown(self.log)}")


class Pool:
    """All workers that run at the moment; leaving the block ends them, whatever happened."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for worker in self.workers.values():
            worker.release(hurry=kind is not None)
        for name in list(self.workers):
            self.drop(name)

    def start(self, variant: Variant, shape: Shape, cores: Sequence[int], eager: bool) -> Worker:
        """Start one and wait until it is ready; BenchError when it does not get there."""
        worker = self.workers[variant.name] = Worker(variant, shape, cores, eager)
        try:
            worker.wait_ready()
        except BaseException as error:
            worker.release(hurry=not isinstance(error, BenchError))
            self.drop(variant.name)
            raise
        return worker

    def drop(self, name: str) -> None:
        """End one."""
        self.workers.pop(name).stop()


def choose_cores(threads: int) -> list[int]:
    """The first cores of those this process may use, as vLLM chooses them.

    Raises:
        BenchError: there are not so many.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(allowed):
        raise BenchError(f"{threads} threads asked for; this machine lets us use {len(allowed)} cores")
    return allowed[:threads]
