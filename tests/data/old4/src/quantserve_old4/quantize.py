"""Quantizer and converter: copies, for a test of how they are called."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Progress = Callable[[str, int, int], None]


def quantize(source: Path, destination: Path, *, progress: Progress | None = None, **options: Any) -> None:
    """Copy the folder."""
    shutil.copytree(source, destination)


def convert(
    source: Path, destination: Path, *, base: Path | None, allow_pickle: bool, progress: Progress | None = None
) -> None:
    """Copy the folder."""
    if progress:
        progress("copying", 0, 1)
    shutil.copytree(source, destination)
