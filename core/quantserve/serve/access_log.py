"""The access log: one line of JSON per request, without anything a client wrote but path and request id."""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import threading
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TextIO

from quantserve.errors import UsageError
from quantserve.serve.trace import Trace

BATCH_S: Final = 0.2
"""Lines are written this often, so that a busy server does not wake a thread per request."""
MOST_WAITING: Final = 100_000
"""Lines kept for a reader that is slower than the requests; the oldest go first, and are counted."""
QUIET_PATHS: Final = ("/health", "/metrics")
"""Asked all the time; logged only when the answer is an error."""
_LONGEST_PATH: Final = 300

logger = logging.getLogger(__name__)


class AccessLog:
    """An observer of requests that writes them to a file or to stderr from a thread of its own.

    A file that was renamed or removed is opened anew, as log rotation expects.

    When it cannot be written, that is logged once, and requests go on without.

    Args:
        destination: ``stderr`` or a path; its folder is made.
    """

    def __init__(self, destination: str) -> None:
        self.path = None if destination == "stderr" else Path(destination).expanduser()
        self._file: TextIO | None = None
        self._lines: deque[str] = deque(maxlen=MOST_WAITING)
        self._dropped = 0
        self._failed = False
        self._writing = threading.Lock()
        self._some = threading.Event()
        threading.Thread(target=self._run, name="access-log", daemon=True).start()
        atexit.register(self.flush)

    def __call__(self, trace: Trace) -> None:
        """Take one finished request; does not block."""
        if trace.path in QUIET_PATHS and trace.status < 400:
            return
        if len(self._lines) == MOST_WAITING:
            self._dropped += 1
        self._lines.append(json.dumps(record(trace), separators=(",", ":")))
        if not self._some.is_set():
            self._some.set()

    def flush(self) -> None:
        """Write what is waiting; returns when it is written."""
        with self._writing:
            self._some.clear()
            lines = []
            while self._lines:
                lines.append(self._lines.popleft())
            if self._dropped:
                lines.append(json.dumps({"time": _now(), "dropped": self._dropped}))
                self._dropped = 0
            if lines:
                self._write("\n".join(lines) + "\n")

    def _run(self) -> None:
        while True:
            self._some.wait()
            time.sleep(BATCH_S)
            self.flush()

    def _write(self, text: str) -> None:
        try:
            stream = sys.stderr if self.path is None else self._current(self.path)
            stream.write(text)
            stream.flush()
            self._failed = False
        except (OSError, ValueError) as error:  # ValueError: stderr was closed
            if not self._failed:
                logger.error("the access log cannot be written: %s", error)
            self._failed = True

    def _current(self, path: Path) -> TextIO:
        """The open file, if it is still the one of that name."""
        file = self._file
        if file is not None:
            try:
                if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                    return file
            except FileNotFoundError:
                pass
            self._file = None
            file.close()
        return self._open(path)

    def _open(self, path: Path) -> TextIO:
        self._file = _opened(path)
        return self._file


def check_destination(destination: str) -> None:
    """See whether an access log can be written where it shall be.

    Raises:
        UsageError: the file cannot be opened.
    """
    if destination in ("off", "stderr"):
        return
    path = Path(destination).expanduser()
    try:
        _opened(path).close()
    except OSError as error:
        raise UsageError(f"access log {path}: {error.strerror}\n  fix: name another file in http.access_log") from None


def _opened(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a", encoding="utf-8")


def record(trace: Trace) -> dict[str, Any]:
    """What the log says about a request; durations in milliseconds, sizes in bytes, what is unknown left out."""
    values = {
        "time": _now(),
        "id": trace.id,
        "client": trace.client,
        "method": trace.method,
        "path": trace.path[:_LONGEST_PATH],
        "model": trace.model,
        "quant_method": trace.quant_method,
        "replica": trace.replica,
        "status": trace.status,
        "error": trace.error_code,
        "stream": trace.stream,
        "client_left": trace.client_left,
        "attempts": trace.attempts,
        "queued_ms": _ms(trace.queued_s),
        "first_byte_ms": _ms(trace.first_byte_s),
        "total_ms": _ms(trace.total_s),
        "bytes_in": trace.bytes_in,
        "bytes_out": trace.bytes_out,
        "chunks": trace.chunks,
    }
    return {key: value for key, value in values.items() if value is not None and value != ""}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
