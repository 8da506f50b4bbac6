"""`quantserve serve --detach`: the server goes on in the background, and this process waits until it is ready."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from quantserve.errors import EngineError, UsageError
from quantserve.serve.driver.announce import say
from quantserve.system.homes import expand, look

POLL_S: Final = 0.2
INTERRUPTED: Final = 130
READY: Final = b"R"
READY_IN_PART: Final = b"F"


@dataclass(frozen=True)
class Detached:
    """The server's side, in the background.

    Attributes:
        log: absolute path of its output.
        pipe: descriptor that tells the waiting process.
    """

    log: str
    pipe: int

    @property
    def stop_line(self) -> str:
        """How to look at the server and to stop it."""
        return f"Log: {self.log}\n`quantserve status` shows the server, `quantserve stop --pid {os.getpid()}` stops it."

    def ready(self, all_models: bool) -> None:
        """Tell the waiting process that it can end."""
        try:
            os.write(self.pipe, READY if all_models else READY_IN_PART)
            os.close(self.pipe)
        except OSError:  # it is gone
            pass


def detach(log: str | None) -> Detached | int:
    """Go on in a new process, in a session of its own; its output goes to a file.

    Call it before threads exist.

    Args:
        log: file that the output is added to; None for a new one in the cache folder.

    Returns:
        in the new process its side; in this one, when the server is ready or has ended, the exit code: 0, 4 if some
        models failed to start, or that of a server which did not start.

    Raises:
        UsageError: the file cannot be written.
    """
    path = Path(expand(log)).absolute() if log else _new_log()
    output = _open(path)
    sys.stdout.flush()
    sys.stderr.flush()
    begin = os.fstat(output).st_size
    receive, send = os.pipe()
    if pid := os.fork():
        os.close(send)
        os.close(output)
        with path.open(errors="replace") as text:
            text.seek(begin)
            return _wait(pid, receive, text, path)
    os.close(receive)
    os.setsid()
    null = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((null, 0), (output, 1), (output, 2)):
        os.dup2(old, new)
    os.close(null)
    os.close(output)
    return Detached(str(path), send)


def _wait(pid: int, pipe: int, text: TextIO, path: Path) -> int:
    """Show the output until the server is ready or has ended; returns the exit code."""
    interrupted = False
    while True:
        try:
            there, _, _ = select.select([pipe], [], [], POLL_S)
            said = os.read(pipe, 1) if there else None
            _relay(text)
            if said == b"":
                return _ended(pid, text, path, interrupted)
            if said is not None and not interrupted:
                return 0 if said == READY else EngineError.exit_code
        except KeyboardInterrupt:
            interrupted = True
            os.kill(pid, signal.SIGTERM)  # it is our child and not yet reaped


def _ended(pid: int, text: TextIO, path: Path, interrupted: bool) -> int:
    _, status = os.waitpid(pid, 0)
    _relay(text)
    if interrupted:
        return INTERRUPTED
    code = os.waitstatus_to_exitcode(status)
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    print(f"error: the server {how} before it was ready\n  log: {path}", file=sys.stderr, flush=True)
    return code if code > 0 else EngineError.exit_code


def _relay(text: TextIO) -> None:
    if more := text.read():
        say(more.removesuffix("\n"))


def _new_log() -> Path:
    folder = look(os.environ).cache / "logs"
    return folder / f"serve-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"the log {path} cannot be written: {reason}\n  fix: name a file with --log") from None
