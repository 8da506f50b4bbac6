"""The worker's side of the pipe: JSON lines, commands in on stdin, answers out on what was stdout.

Standard library only: the llama.cpp worker runs in another virtual environment. Everything that libraries print goes
to stderr, which the parent sends to a log file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

Measure = Callable[..., dict[str, Any]]


class Channel:
    """The pipe to the parent. Make it before anything prints."""

    def __init__(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends this process
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def send(self, answer: Mapping[str, Any]) -> None:
        """One line to the parent."""
        self.out.write(json.dumps(answer) + "\n")

    def run(self, start: Callable[[], tuple[dict[str, Any], Mapping[str, Measure]]]) -> None:
        """Start, say ready, then answer commands until the parent closes the pipe."""
        try:
            ready, measures = start()
        except BaseException as error:
            traceback.print_exc()
            self.send({"error": cause(error)})
            return
        self.send(ready)
        for line in sys.stdin:
            command = json.loads(line)
            cpu, wall = time.process_time(), time.perf_counter()
            try:
                answer = measures[command.pop("do")](**command)
            except Exception as error:
                traceback.print_exc()
                answer = {"error": cause(error)}
            spent = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
            self.send({**answer, **spent})


def cause(error: BaseException) -> str:
    """Type and message of an error, on one line of bearable length, without what pydantic adds."""
    return f"{type(error).__name__}: {' '.join(str(error).partition('[type=')[0].split())}"[:400]


class MemoryWatch:
    """Peak memory of this process while the block runs, in bytes.

    Attributes:
        before: resident when it began.
        peak: most resident, pages of mapped files included (the kernel's VmHWM, reset at the start).
        peak_anonymous: most resident without them, sampled every few milliseconds.
        anonymous_before: the same when it began.
        kept_anonymous: the same when it ended.
    """

    def __init__(self) -> None:
        self.before = self.peak = self.peak_anonymous = self.anonymous_before = self.kept_anonymous = 0

    def __enter__(self) -> MemoryWatch:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
        except OSError:
            print("cannot reset VmHWM: the peak counts from the start of the process", file=sys.stderr)
        self.before, self.anonymous_before = status("VmRSS"), status("RssAnon")
        self.peak_anonymous = self.anonymous_before
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.done.set()
        self.thread.join()
        self.peak, self.kept_anonymous = status("VmHWM"), status("RssAnon")

    def _sample(self) -> None:
        while not self.done.wait(0.005):
            self.peak_anonymous = max(self.peak_anonymous, status("RssAnon"))

    def figures(self) -> dict[str, int]:
        """Bytes above what was resident before: all, and without mapped files; and what stayed."""
        return {
            "peak_extra": self.peak - self.before,
            "peak_extra_anonymous": max(self.peak_anonymous, self.kept_anonymous) - self.anonymous_before,
            "kept_anonymous": self.kept_anonymous - self.anonymous_before,
        }


def status(key: str) -> int:
    """A size in bytes from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0
