"""Whether the compiled operators are here and what they will use; answered from files, without torch."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
# Best first: name and the processor flags it needs.
INSTRUCTION_SETS = (
    ("avx512bf16", ("avx512f", "avx512bw", "avx512dq", "avx512_bf16")),
    ("avx512", ("avx512f", "avx512bw", "avx512dq")),
    ("avx2", ("avx2", "fma")),
)


@dataclass(frozen=True, slots=True)
class Status:
    """What the kernels are on this machine.

    Attributes:
        native: whether the compiled operators are installed; without them every call is plain torch.
        instruction_set: what they use here (``avx512bf16``, ``avx512``, ``avx2``, ``portable``), or ``torch``.
        reason: why they are not installed; empty when they are.
    """

    native: bool
    instruction_set: str
    reason: str = ""


def library() -> Path | None:
    """The compiled library of this Python, None when the package was installed without."""
    return min(PACKAGE.glob("_C.*.so"), default=None)


@cache
def status() -> Status:
    """What this machine will use; reads the package's folder and ``/proc/cpuinfo``, imports nothing."""
    if library() is None:
        note = PACKAGE / "build-failure.txt"
        reason = note.read_text().strip().splitlines()[0] if note.exists() else "built without a compiler"
        return Status(False, "torch", reason)
    forced = os.environ.get("QUANTSERVE_KERNELS_ISA")
    return Status(True, forced or _best())


def _best() -> str:
    if platform.machine() not in ("x86_64", "AMD64"):
        return "portable"
    flags = _flags()
    return next((name for name, needed in INSTRUCTION_SETS if flags.issuperset(needed)), "portable")


def _flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
