"""Other processes, bounded in time and output: a fresh Python for one question, and one with vLLM that answers many."""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quantserve.plugins import foreign
from quantserve.text import harmless

MOST_OUTPUT: Final = 16 << 20
"""Bytes that a process may print before writing fails in it."""
LOOK_S: Final = 1.0
SHOWN: Final = 1_500
"""Characters of its output that are shown."""


@dataclass(frozen=True)
class Answer:
    """What a process answered.

    Attributes:
        value: JSON; None where it did not answer.
        problem: why it did not, "" where it did.
        printed: the beginning of what it printed, in one line.
    """

    value: Any
    problem: str
    printed: str


def ask(
    code: str, *arguments: str, environ: Mapping[str, str] | None = None, parts: int = 0, bounded: bool = True
) -> Answer:
    """Run Python code in a fresh process; it calls ``answer(value)`` once.

    Args:
        code: its text; ``sys.argv[1:]`` are the arguments.
        arguments: for the code.
        environ: changes to the environment; "" removes a variable.
        parts: how many times as long as a hook it may take; as an import by default.
        bounded: whether files that it writes have at most 16 MiB.
    """
    seconds = foreign.hook_seconds() * (parts or foreign.IMPORT_PARTS)
    with tempfile.TemporaryDirectory(prefix="quantserve-") as folder:
        given, output = Path(folder, "answer.json"), Path(folder, "output.txt")
        limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({MOST_OUTPUT}, {MOST_OUTPUT}))\n" if bounded else ""
        begin = (
            f"import sys, json, resource\n{limit}"
            f"def answer(value): open({str(given)!r}, 'w').write(json.dumps(value))\n"
        )
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", begin + code, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=changed(environ or {}),
            )
            try:
                in_time = _in_time(process.pid, seconds, lambda: _ended(process))
            finally:
                process.kill()
                process.wait()
            problem = f"the process ended with {process.returncode}"
            if not in_time:
                problem = f"the process did not end within {seconds:g} s"
        printed = shown(output)
        if given.exists() and "did not end" not in problem:
            return Answer(json.loads(given.read_text()), "", printed)
        return Answer(None, f"{problem}: {shown(output, end=True)}", printed)


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has ended, or ends within a second."""
    try:
        process.wait(LOOK_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def _in_time(process: int, seconds: float, done: Callable[[], bool]) -> bool:
    """Whether `done`, which waits a second at most, comes true in time; 0 seconds are no limit.

    Time in which the process waited for a processor does not count.
    """
    clock = foreign.Clock(process, process)
    while not done():
        if seconds and clock.elapsed() > seconds:
            return False
    return True


def changed(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment with these changes."""
    return {name: value for name, value in {**os.environ, **environ}.items() if value}


def shown(output: Path, *, end: bool = False) -> str:
    """The beginning of a file, or its end, in one harmless line; of a traceback the innermost place and the error."""
    with output.open("rb") as file:
        if end:
            file.seek(max(0, output.stat().st_size - SHOWN))
        text = file.read(SHOWN).decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if end and (places := [at for at, line in enumerate(lines) if line.startswith('File "')]):
        begin = max((at for at, line in enumerate(lines) if line.startswith("Traceback (")), default=0)
        lines = [*lines[:begin], lines[places[-1]], lines[-1]]
    return harmless(" | ".join(lines), 2 * SHOWN)


class Worker:
    """A process that imports vLLM once and answers requests as JSON, one a line.

    Args:
        module: what it runs: `quantserve.testing.worker` for layers, `quantserve.testing.engines` for engines.
        environ: its environment.
    """

    def __init__(self, module: str, environ: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="quantserve-")
        self._output = Path(self._folder.name, "output.txt")
        read, write = os.pipe()
        with self._output.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(write)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=(write,),
                env=dict(environ),
            )
        os.close(write)
        self._answers = os.fdopen(read, "rb")
        atexit.register(self.close)

    def ask(self, request: Mapping[str, object]) -> Answer:
        """The answer to one request; after one that failed the worker has ended."""
        assert self._process.stdin is not None
        seconds = foreign.hook_seconds() * foreign.REGISTER_PARTS
        answered = False
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            ready = _in_time(
                self._process.pid, seconds, lambda: bool(select.select([self._answers], [], [], LOOK_S)[0])
            )
            line = self._answers.readline() if ready else b""
            answered = line != b""
            problem = "" if answered else "the process ended" if ready else f"no answer within {seconds:g} s"
        except OSError as error:
            line, problem = b"", f"the process ended: {error}"
        finally:
            if not answered:  # also after Ctrl-C: an answer must belong to the request
                self.close()
        if problem:
            return Answer(None, f"{problem}: {shown(self._output, end=True)}", "")
        return Answer(json.loads(line), "", "")

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        atexit.unregister(self.close)


_workers: dict[str, Worker] = {}
"""By module. All plugins share them, because importing vLLM takes seconds."""


def _worker(module: str, environ: Mapping[str, str]) -> Worker:
    if module not in _workers or not _workers[module].alive:
        _workers[module] = Worker(module, environ)
    return _workers[module]


def worker() -> Worker:
    """The process with vLLM's layers."""
    own = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    return _worker("quantserve.testing.worker", changed(own))


def forked(function: str, environ: Mapping[str, str], log: Path, **arguments: object) -> Answer:
    """Call a function of `quantserve.testing.engines` in a process forked from one that has imported vLLM.

    Args:
        function: ``generate`` or ``compare``.
        environ: variables of vLLM, and others added to those of this process.
        log: a file for what the process prints.
        arguments: of the function.
    """
    out = log.with_suffix(".json")
    request = {
        "function": function,
        "environment": {**_surroundings(), **environ},
        "log": str(log),
        "out": str(out),
        "arguments": arguments,
    }
    answer = _worker("quantserve.testing.engines", _surroundings()).ask(request)
    said: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    printed = shown(log, end=True) if log.exists() else ""
    if answer.problem or "value" not in said:
        return Answer(None, answer.problem or said.get("error") or f"the process ended with {answer.value}", printed)
    return Answer(said["value"], "", printed)


def _surroundings() -> dict[str, str]:
    """The variables of this process without vLLM's, which tests of layers leave there."""
    own = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # vLLM would spawn the engine core, and that its worker; each would import everything again.
    own |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    # Threads of a small model cost more than they compute, most of all when the other core has work of its own.
    own |= {"OMP_NUM_THREADS": "1"}
    return {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")} | own


def binding(ranks: int) -> dict[str, str]:
    """By itself vLLM binds one rank to each NUMA node; several on one node need their cores named."""
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join((cores * ranks)[:ranks])} if ranks > 1 else {}
