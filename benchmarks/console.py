"""Progress on stderr, and the error for what a person has to do something about. Standard library only."""

from __future__ import annotations

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "bench"
BEGAN = time.monotonic()


class BenchError(Exception):
    """What a person has to do something about; str(error) says what."""


def say(text: str) -> None:
    """A line of progress with the minutes and seconds since the start."""
    minutes, seconds = divmod(int(time.monotonic() - BEGAN), 60)
    print(f"[{minutes:3d}:{seconds:02d}] {text}", file=sys.stderr, flush=True)


def shown(path: Path) -> str:
    """A path as a person reads it: relative to the repository where it lies inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
