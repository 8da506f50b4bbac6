"""Waiting for what must come true, however busy the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable

HANGS_S = 120.0
"""After so long what takes a moment on an idle machine is taken for hanging."""


def until(holds: Callable[[], object], seconds: float = HANGS_S, *, not_yet: type[Exception] | tuple[()] = ()) -> None:
    """Wait until `holds` returns something true.

    Args:
        not_yet: an exception that counts as false.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if holds():
                return
        except not_yet:
            pass
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds:g} s")
