"""Reads the logs of the engine's processes during the start: only they contain the cause of a failed start."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]

from quantserve.system.homes import free_bytes, look

_ERROR = re.compile(
    r"^(?P<before>.*?)(?P<cause>\b(?:[a-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit): .+)$", re.MULTILINE
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_VAGUE: Final = ("Engine core initialization failed", "WorkerProc initialization failed", "Executor failed")
_FAILED: Final = "EngineCore failed to start"
_ENGINE: Final = "VLLM::"
"""Prefix of the names of the engine's processes."""
_FULL: Final = "No space left on device"
_ROOM: Final = 1 << 20
_LONGEST: Final = 600
_READ: Final = 4 << 20
_POLL_S: Final = 1.0
_PATIENCE_S: Final = 15.0

logger = logging.getLogger(__name__)


class EngineLogs:
    """The output of this process from now on, if it goes to a file (in Ray it does)."""

    def __init__(self) -> None:
        self._from: dict[Path, int] = {}
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):
                path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
                if path.is_file():
                    self._from[path] = path.stat().st_size

    def text(self) -> str:
        """The output so far, at most 4 MiB per stream."""
        parts: list[bytes] = []
        for path, start in self._from.items():
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(start)
                parts.append(file.read(_READ))
        return _COLOUR.sub("", b"\n".join(parts).decode(errors="replace"))

    def cause(self, error: BaseException) -> str:
        """The root cause: vLLM's error may only report that a process failed, and that process logged the reason."""
        text = f"{type(error).__name__}: {error}"
        if any(vague in text for vague in _VAGUE):
            text = last_cause(self.text()) or text
        return with_full_folders(text)

    @contextlib.contextmanager
    def killing_failed_starts(self) -> Iterator[None]:
        """Kill an engine that logged a failed start and does not exit: vLLM would wait for it forever."""
        done = threading.Event()
        watch = threading.Thread(target=self._kill_when_failed, args=(done,), daemon=True)
        watch.start()
        try:
            yield
        finally:
            done.set()

    def _kill_when_failed(self, done: threading.Event) -> None:
        while not done.wait(_POLL_S):
            if _FAILED in self.text() and not done.wait(_PATIENCE_S):
                logger.error("the engine failed to start and did not exit within %.0f s; killing it", _PATIENCE_S)
                for process in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if process.name().startswith(_ENGINE):
                            process.kill()
                return


def with_full_folders(cause: str) -> str:
    """The cause; if it is a full disk, with the full folders among those that vLLM and torch write to."""
    if _FULL not in cause:
        return cause
    folders = look(os.environ).folders
    written = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TMPDIR")
    full = [f"{folders[name]} ({name})" for name in written if free_bytes(Path(folders[name])) < _ROOM]
    return f"{_FULL}: {', '.join(full)}" if full else cause


def last_cause(log: str) -> str | None:
    """The last exception in a log; vLLM's log records take precedence over tracebacks of exiting interpreters."""
    logged: str | None = None
    printed: str | None = None
    for match in _ERROR.finditer(log):
        cause = match["cause"][:_LONGEST]
        if any(vague in cause for vague in _VAGUE):
            continue
        if " ERROR " in match["before"]:
            logged = cause
        else:
            printed = cause
    return logged or printed
