"""What the engine's processes log while they start: the only place where they say why they failed."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]

from quantserve.serve.cluster import free_bytes

_ERROR = re.compile(
    r"^(?P<before>.*?)(?P<cause>\b(?:[a-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit): .+)$", re.MULTILINE
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_VAGUE: Final = ("Engine core initialization failed", "WorkerProc initialization failed", "Executor failed")
_FAILED: Final = "EngineCore failed to start"
_ENGINE: Final = "VLLM::"
"""How the names of the engine's processes begin."""
_FULL: Final = "No space left on device"
_ROOM: Final = 1 << 20
_LONGEST: Final = 600
_READ: Final = 4 << 20
_LOOK_S: Final = 1.0
_PATIENCE_S: Final = 15.0

logger = logging.getLogger(__name__)


class EngineLogs:
    """What is written from now on to this process's output, when that is a file (as it is in Ray)."""

    def __init__(self) -> None:
        self._from: dict[Path, int] = {}
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):
                path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
                if path.is_file():
                    self._from[path] = path.stat().st_size

    def text(self) -> str:
        """Everything written so far, at most 4 MiB of each stream."""
        parts: list[bytes] = []
        for path, start in self._from.items():
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(start)
                parts.append(file.read(_READ))
        return _COLOUR.sub("", b"\n".join(parts).decode(errors="replace"))

    def cause(self, error: BaseException) -> str:
        """What really went wrong: vLLM may say only that a process failed, which that process explained in its log."""
        said = f"{type(error).__name__}: {error}"
        if any(vague in said for vague in _VAGUE):
            said = last_cause(self.text()) or said
        return with_full_folders(said)

    @contextlib.contextmanager
    def killing_failed_starts(self) -> Iterator[None]:
        """Kill an engine that has logged its failure and does not exit: vLLM would wait for it for ever."""
        done = threading.Event()
        watch = threading.Thread(target=self._kill_when_failed, args=(done,), daemon=True)
        watch.start()
        try:
            yield
        finally:
            done.set()

    def _kill_when_failed(self, done: threading.Event) -> None:
        while not done.wait(_LOOK_S):
            if _FAILED in self.text() and not done.wait(_PATIENCE_S):
                logger.error("the engine failed to start and does not exit; killing it")
                for process in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if process.name().startswith(_ENGINE):
                            process.kill()
                return


def with_full_folders(cause: str) -> str:
    """A cause that speaks of a full disk names which of the folders vLLM and torch write to are full."""
    if _FULL not in cause:
        return cause
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folders = {
        "VLLM_CACHE_ROOT": os.environ.get("VLLM_CACHE_ROOT") or str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir(),
        "TMPDIR": tempfile.gettempdir(),
    }
    full = [f"{folder} ({name})" for name, folder in folders.items() if free_bytes(Path(folder)) < _ROOM]
    return f"{_FULL}: {', '.join(full)}" if full else cause


def last_cause(log: str) -> str | None:
    """The last line of a log that names an exception; vLLM's records count before what dying interpreters print."""
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
