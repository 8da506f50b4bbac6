"""Answers that a file keeps, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

from quantserve.errors import UsageError
from quantserve_bench.request import Request

NAME: Final = "answers.jsonl"


class Answers:
    """The answers so far, by request; a context manager.

    A line of the file has the hash of model and request, so that a changed question or parameter is asked anew. Each
    line is written when its answer is complete; a line that is cut off, as a crash leaves it, is removed.

    Args:
        folder: of the file; None keeps the answers in memory only.
        note: called with a sentence about a damaged file.

    Raises:
        UsageError: the file cannot be used.
    """

    def __init__(self, folder: Path | None, note: Callable[[str], None]) -> None:
        self._known: dict[str, dict[str, Any]] = {}
        self._file: int | None = None
        self._path = folder / NAME if folder else None
        if folder is None or self._path is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._lock()
            self._load(note)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"--out {folder}: {getattr(error, 'strerror', None) or error}\n  fix: give another --out"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._known[key]

    def add(self, key: str, answer: dict[str, Any]) -> None:
        """Keep an answer.

        Raises:
            OSError: the disk is full.
        """
        self._known[key] = answer
        if self._file is not None:
            data = (json.dumps({"key": key, **answer}) + "\n").encode()
            while data:
                data = data[os.write(self._file, data) :]

    def _lock(self) -> None:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError("another evaluation writes there") from None

    def _load(self, note: Callable[[str], None]) -> None:
        assert self._path is not None
        assert self._file is not None
        data = self._path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.ftruncate(self._file, end)
            note(f"{self._path}: the last line was cut off and is asked again")
        damaged = 0
        for line in data[:end].splitlines():
            try:
                value = json.loads(line)
                if isinstance(value["text"], str):
                    self._known[value.pop("key")] = value
            except (ValueError, TypeError, KeyError, AttributeError):
                damaged += 1
        if damaged:
            note(f"{self._path}: {damaged} damaged lines are left out, and their questions asked again")


def key_of(model: str, request: Request) -> str:
    """The hash of a request to a model."""
    body = request.body(model)
    for name in ("stream", "stream_options"):
        body.pop(name, None)
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
