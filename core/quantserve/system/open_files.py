"""The limit of open files: every connection is one."""

from __future__ import annotations

import contextlib
import resource


def raise_open_files() -> int:
    """Raise the soft limit of open files of this process to the hard limit; returns the limit, 2**20 for none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft
