"""Where the files of a checkpoint come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

from quantserve.checkpoint.data import Location
from quantserve.finding import Finding


class Source(Protocol):
    """The top-level files of one checkpoint: a folder, or a repository on the hub."""

    @property
    def location(self) -> Location:
        """Where the files are."""

    @property
    def path(self) -> Path | None:
        """The folder, None on the hub."""

    @property
    def revision(self) -> str | None:
        """The commit, None for a plain folder."""

    @property
    def files(self) -> Mapping[str, int]:
        """Name -> bytes, -1 when unknown."""

    @property
    def findings(self) -> list[Finding]:
        """What was wrong with the files themselves (dangling links, ...)."""

    def prefetch(self, sizes: Iterable[tuple[str, int]]) -> None:
        """Say that the first `size` bytes of these files are read next; a remote source fetches them at once."""

    def open(self, name: str) -> BinaryIO:
        """Open a file of `files` for seeking and reading.

        Raises OSError (here or while reading) when this one file cannot be read, CheckpointError when the source
        as a whole cannot be reached.
        """
