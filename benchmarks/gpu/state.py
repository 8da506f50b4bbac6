"""What a run has measured so far, the time it has left, and what could not be measured."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import program
from benchmarks.console import BenchError, say

T = TypeVar("T")


class OutOfTimeError(Exception):
    """The run has taken as long as it may."""


class State:
    """Passed to the parts, which fill `found`.

    Args:
        path: results.json.
        found: what it holds.
        until: on the clock of `time.monotonic`.
    """

    def __init__(self, path: Path, found: dict[str, Any], until: float) -> None:
        self.path, self.found, self.until = path, found, until

    def save(self) -> None:
        """Write results.json."""
        program.write(self.path, json.dumps(self.found) + "\n")

    def check_time(self) -> None:
        """End the run when its time is over; called before every cell and every weight.

        Raises:
            OutOfTimeError: it is.
        """
        if time.monotonic() >= self.until:
            raise OutOfTimeError

    def attempt(self, what: str, action: Callable[..., T], *arguments: object) -> T | None:
        """The action's result, or None where it failed: then the reason is kept, and the others go on."""
        try:
            return action(*arguments)
        except (BenchError, OutOfTimeError):
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
            self.found["refused"][what] = reason
            say(f"{what} is left out: {reason}")
            return None
