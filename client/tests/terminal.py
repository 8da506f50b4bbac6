"""The command in a terminal of its own (a pty)."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
from types import TracebackType
from typing import Self

PATIENCE_S = 60.0
"""After so long what takes a moment is taken for hanging."""


class Terminal:
    """`quantserve` in a terminal; a context manager.

    Args:
        arguments: of the command.
        columns, rows: size of the terminal.
    """

    def __init__(self, *arguments: str, columns: int = 100, rows: int = 30) -> None:
        self.screen = ""
        self._seen = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pid, self._file = pty.fork()
        if not pid:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            variables = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "CI")}
            os.execve(
                sys.executable,
                [sys.executable, "-m", "quantserve", *arguments],
                {**variables, "TERM": "xterm-256color"},
            )
        self._pid = pid
        self.code: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.code is None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._file)

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def interrupt(self, pattern: str) -> None:
        """Press Ctrl-C until the pattern has come: Python loses one that comes just before it waits for a line."""
        while not re.search(pattern, plain(self.screen)[self._seen :]):
            self.type("\x03")
            while select.select([self._file], [], [], 2)[0] and self._read():
                if re.search(pattern, plain(self.screen)[self._seen :]):
                    break
        self.wait_for(pattern)

    def wait_for(self, pattern: str) -> str:
        """Read until the pattern has come after what was waited for before; returns the text in between, and it."""
        while not (found := re.search(pattern, plain(self.screen)[self._seen :])):
            assert self._read(), f"no {pattern!r}:\n{plain(self.screen)}"
        start, self._seen = self._seen, self._seen + found.end()
        return plain(self.screen)[start : self._seen]

    def end(self) -> int:
        """Read to the end; returns the exit code."""
        while self._read():
            pass
        self.code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self.code

    def _read(self) -> bool:
        assert select.select([self._file], [], [], PATIENCE_S)[0], f"nothing comes:\n{plain(self.screen)}"
        try:
            data = os.read(self._file, 65536)
        except OSError:  # the command has ended
            data = b""
        self.screen += self._decoder.decode(data)
        return bool(data)


def plain(text: str) -> str:
    """Without colours and movements of the cursor, also one of which only the beginning has come."""
    return re.sub(r"\x1b(\[[0-9;?]*([A-Za-z]|$)|$)", "", text).replace("\r", "")
