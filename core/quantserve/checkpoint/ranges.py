"""Files on a server, read by byte ranges: what a hub's repository and a bucket have in common."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final, Protocol, cast

from quantserve.checkpoint.data import Location
from quantserve.checkpoint.safetensors import FIRST_READ
from quantserve.finding import Finding

THREADS: Final = 8


class Ranges(Protocol):
    """One remote file."""

    def read(self, start: int, count: int) -> tuple[bytes, int | None]:
        """At most `count` bytes from `start`, and the size of the whole file where the server says it.

        Raises OSError when the server has no such file, CheckpointError for everything else.
        """

    def size(self) -> int:
        """Bytes of the whole file. Raises OSError when the server does not say."""


@dataclass
class Remote(ABC):
    """The top-level files of a place on a server. See `Source`."""

    revision: str | None
    files: dict[str, int]
    location: Location
    findings: list[Finding] = field(default_factory=list)
    path: Path | None = None
    _fetched: dict[str, bytes] = field(default_factory=dict)

    @abstractmethod
    def ranges(self, name: str) -> Ranges:
        """One of `files`."""

    def prefetch(self, sizes: Iterable[tuple[str, int]]) -> None:
        """Fetch the beginnings of several files at once."""
        wanted = [(name, FIRST_READ if size < 0 else size) for name, size in sizes if self.files[name] != 0]
        with ThreadPoolExecutor(THREADS, thread_name_prefix="quantserve-remote") as pool:
            for name, start, total in pool.map(self._start, wanted):
                if start is not None:
                    self._fetched[name] = start
                if total is not None and self.files[name] < 0:
                    self.files[name] = total

    def _start(self, item: tuple[str, int]) -> tuple[str, bytes | None, int | None]:
        name, size = item
        try:
            return name, *self.ranges(name).read(0, size)
        except OSError:  # this file alone: said again when it is opened
            return name, None, None

    def open(self, name: str) -> BinaryIO:
        """Open one of `files` for reading by ranges."""
        made = RangeFile(self.ranges(name), self.files[name], self._fetched.pop(name, b""))
        return cast(BinaryIO, made)


class RangeFile(io.RawIOBase):
    """A remote file: every read outside the bytes at hand is one range request."""

    def __init__(self, ranges: Ranges, size: int, start: bytes = b"") -> None:
        super().__init__()
        self._ranges, self._size = ranges, size
        self._at, self._first, self._block = 0, 0, start

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always, except from the end of a file of unknown size."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move; costs nothing until the next read."""
        if whence == io.SEEK_END:
            if self._size < 0:
                self._size = self._ranges.size()
            offset += self._size
        elif whence == io.SEEK_CUR:
            offset += self._at
        self._at = max(0, offset)
        return self._at

    def tell(self) -> int:
        """Position of the next read."""
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        """Read `size` bytes, less only at the end of the file."""
        if self._size >= 0:
            left = max(0, self._size - self._at)
            size = left if size < 0 else min(size, left)
        if size < 0:
            raise OSError("the size of the file is not known")
        inside = self._at - self._first
        if size and not (inside >= 0 and inside + size <= len(self._block)):
            self._block, total = self._ranges.read(self._at, max(size, FIRST_READ))
            self._first, inside = self._at, 0
            if self._size < 0 and total is not None:
                self._size = total
        data = self._block[inside : inside + size]
        self._at += len(data)
        return data
