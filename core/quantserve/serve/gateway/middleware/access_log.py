"""The access log: one JSON line per request; of the client's input only path and request id."""

from __future__ import annotations

import atexit
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
from quantserve.serve.gateway.middleware.trace import Trace
from quantserve.system.homes import expand
from quantserve.text import to_json

BATCH_S: Final = 0.2
"""Write interval, so that a busy server does not wake a thread per request."""
BUFFER_LINES: Final = 100_000
"""Most buffered lines; when writing is slower than the requests, the oldest are dropped and counted."""
QUIET_PATHS: Final = ("/health", "/metrics", "/status")
"""Polled paths, which are logged only for errors, as those of the web page are."""
_LONGEST_PATH: Final = 300

logger = logging.getLogger(__name__)


class AccessLog:
    """A request observer that writes to a file or to stderr in its own thread.

    A file that was renamed or removed is opened again, as log rotation expects. If writing fails, an error is logged
    once and requests are served without the log.

    Args:
        destination: ``stderr`` or a path; its folder is created.
    """

    def __init__(self, destination: str) -> None:
        self.path = None if destination == "stderr" else expand(destination)
        self._file: TextIO | None = None
        self._lines: deque[str] = deque(maxlen=BUFFER_LINES)
        self._dropped = 0
        self._failed = False
        self._writing = threading.Lock()
        self._some = threading.Event()
        threading.Thread(target=self._run, name="access-log", daemon=True).start()
        atexit.register(self.flush)

    def __call__(self, trace: Trace) -> None:
        """Log one completed request; does not block."""
        if (trace.path in QUIET_PATHS or trace.path.startswith("/explorer/")) and trace.status < 400:
            return
        if len(self._lines) == BUFFER_LINES:
            self._dropped += 1
        self._lines.append(to_json(record(trace), separators=(",", ":")))
        if not self._some.is_set():
            self._some.set()

    def flush(self) -> None:
        """Write the buffered lines."""
        with self._writing:
            self._some.clear()
            lines = []
            while self._lines:
                lines.append(self._lines.popleft())
            if self._dropped:
                lines.append(to_json({"time": _now(), "dropped": self._dropped}))
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
                logger.error("cannot write the access log: %s", error)
            self._failed = True

    def _current(self, path: Path) -> TextIO:
        """The open file; opened again if the path names another file now."""
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
    """Check that the access log can be written.

    Raises:
        UsageError: the file cannot be opened.
    """
    if destination in ("off", "stderr"):
        return
    path = expand(destination)
    try:
        _opened(path).close()
    except OSError as error:
        raise UsageError(
            f"access log {path}: {error.strerror}\n  fix: set http.access_log to a writable file"
        ) from None


def _opened(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a", encoding="utf-8")


def record(trace: Trace) -> dict[str, Any]:
    """The log fields of a request; durations in milliseconds, sizes in bytes; unknown values are omitted."""
    values = {
        "time": _now(),
        "id": trace.id,
        "client": trace.client,
        "method": trace.method,
        "path": trace.path[:_LONGEST_PATH],
        "model": trace.model,
        "adapter": trace.adapter,
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
