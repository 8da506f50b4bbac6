"""The servers that this user runs on this machine: a file for each, for ``quantserve status`` and ``quantserve stop``.

A file names a process by its number and its start time, so that another process that gets the number later is never
taken for the server. Every server writes its own file only, and replaces it in one step; files of processes that have
ended are removed by whoever reads them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from quantserve.system.homes import look

LARGEST: Final = 1 << 20
"""Bytes of a file; more is none of ours."""


@dataclass(frozen=True)
class Server:
    """A server as its file describes it.

    Attributes:
        pid: of ``quantserve serve``.
        start_ticks: start of this process, in clock ticks after the boot of the machine.
        boot, pids: id of the boot, and of the namespace of process numbers.
        host: name of the machine; the folder may be on a network file system.
        started: Unix time.
        state: ``starting``, ``ready`` or ``stopping``.
        url: its address from this machine; "" before it listens.
        keys: whether requests need an API key.
        drain_s: longest time that it drains.
        sources: its configs and models, as on the command line.
        folder: its working directory.
        models: ids of the models that are to be served.
        failed: applications that failed to start.
        log: file of its output; "" for a server in the foreground.
    """

    pid: int
    start_ticks: int
    boot: str
    pids: str
    host: str
    started: float
    state: str = "starting"
    url: str = ""
    keys: bool = False
    drain_s: float = 0.0
    sources: tuple[str, ...] = ()
    folder: str = ""
    models: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    log: str = ""

    @property
    def runs(self) -> bool:
        """Whether its process is alive."""
        return self.boot == _boot() and start_ticks(self.pid) == self.start_ticks

    @property
    def is_here(self) -> bool:
        """Whether its process number has a meaning here: this machine, this container."""
        return self.host == socket.gethostname() and (self.boot != _boot() or self.pids == _pids())


class Record:
    """The file of this process; nothing is raised when it cannot be written, because a server runs without it, too.

    Args:
        environ: names the folder.
        values: fields of `Server`.
    """

    def __init__(self, environ: Mapping[str, str], **values: Any) -> None:
        pid = os.getpid()
        place = (start_ticks(pid) or 0, _boot(), _pids(), socket.gethostname())
        self.server = Server(pid, *place, time.time(), folder=_working_directory(), **values)
        self._path = folder(environ) / f"{pid}-{self.server.start_ticks}.json"
        self._removed = False
        self._write()

    def update(self, **values: Any) -> None:
        """Change fields."""
        self.server = replace(self.server, **values)
        self._write()

    def remove(self) -> None:
        """Remove the file: the server ends."""
        self._removed = True
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _write(self) -> None:
        if self._removed:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            number, draft = tempfile.mkstemp(dir=self._path.parent, prefix=".draft-")  # 0600
            try:
                with os.fdopen(number, "w") as file:
                    json.dump(asdict(self.server), file)
                os.replace(draft, self._path)
            except OSError:
                os.unlink(draft)
                raise


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the files are."""
    return look(environ).cache / "servers"


def running(environ: Mapping[str, str] = os.environ) -> list[Server]:
    """The servers that run here, oldest first; files of those that have ended are removed."""
    found = []
    try:
        paths = sorted(folder(environ).glob("*.json"))
    except OSError:
        return []
    for path in paths:
        server = _read(path)
        if server is None or not server.is_here:
            continue
        if server.runs:
            found.append(server)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
    return sorted(found, key=lambda server: server.started)


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks after the boot (proc(5), field 22 of stat); None if it does not run."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    after_name = text.rpartition(")")[2].split()
    return None if after_name[0] in ("Z", "X") else int(after_name[19])


def _read(path: Path) -> Server | None:
    """The server of a file; None for a file that is not this user's, or of another form."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(number, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            return None
        try:
            value = json.loads(file.read(LARGEST))
            lists = {name: tuple(map(str, value[name])) for name in ("sources", "models", "failed")}
            known = {one.name: value[one.name] for one in fields(Server) if one.name in value}
            server = Server(**{**known, **lists})
            return server if isinstance(server.pid, int) and server.pid > 0 else None
        except (ValueError, TypeError, KeyError):
            return None


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _pids() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _working_directory() -> str:
    with contextlib.suppress(OSError):
        return os.getcwd()
    return ""
