"""Other processes, bounded in time and output: a fresh Python for one question, and one with vLLM that answers many."""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quantserve.plugins import foreign
from quantserve.text import harmless

MOST_OUTPUT: Final = 16 << 20
"""Bytes that a process may print before writing fails in it."""
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
            try:
                done = subprocess.run(
                    [sys.executable, "-c", begin + code, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=seconds or None,
                    env=changed(environ or {}),
                )
                problem = f"the process ended with {done.returncode}"
            except subprocess.TimeoutExpired:
                problem = f"the process did not end within {seconds:g} s"
        printed = shown(output)
        if given.exists() and "did not end" not in problem:
            return Answer(json.loads(given.read_text()), "", printed)
        return Answer(None, f"{problem}: {shown(output, end=True)}", printed)


def changed(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment with these changes."""
    return {name: value for name, value in {**os.environ, **environ}.items() if value}


def shown(output: Path, *, end: bool = False) -> str:
    """The beginning of a file, or its end, in one harmless line."""
    with output.open("rb") as file:
        if end:
            file.seek(max(0, output.stat().st_size - SHOWN))
        text = file.read(SHOWN).decode(errors="replace")
    return harmless(" | ".join(line for line in text.splitlines() if line.strip()), 2 * SHOWN)


class Worker:
    """A process that imports vLLM once and answers requests as JSON, one a line (`quantserve.testing.worker`)."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="quantserve-")
        self._output = Path(self._folder.name, "output.txt")
        read, write = os.pipe()
        with self._output.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "quantserve.testing.worker", str(write)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=(write,),
                env=changed({"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}),
            )
        os.close(write)
        self._answers = os.fdopen(read, "rb")
        atexit.register(self.close)

    def ask(self, request: Mapping[str, object]) -> Answer:
        """The answer to one request; after one that failed the worker has ended."""
        assert self._process.stdin is not None
        seconds = foreign.hook_seconds() * foreign.REGISTER_PARTS
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            ready, _, _ = select.select([self._answers], [], [], seconds or None)
            line = self._answers.readline() if ready else b""
            problem = "" if line else "the process ended" if ready else f"no answer within {seconds:g} s"
        except OSError as error:
            line, problem = b"", f"the process ended: {error}"
        if problem:
            self.close()
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


_workers: list[Worker] = []


def worker() -> Worker:
    """The worker of this process, which all plugins share, because importing vLLM takes seconds."""
    if not _workers or not _workers[-1].alive:
        _workers.append(Worker())
    return _workers[-1]
