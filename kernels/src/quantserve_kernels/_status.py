"""Whether the compiled operators are here and what they will use; answered from files, without torch."""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
_X86 = (
    ("amx", ("avx512f", "avx512bw", "avx512dq", "avx512_bf16", "avx512vbmi", "amx_tile", "amx_bf16")),
    ("avx512bf16", ("avx512f", "avx512bw", "avx512dq", "avx512_bf16", "avx512vbmi")),
    ("avx512", ("avx512f", "avx512bw", "avx512dq")),
    ("avx2", ("avx2", "fma")),
)
_ARM = (("neonbf16", ("bf16",)), ("neon", ()))
# By `platform.machine()`, best first: name and the processor flags it needs.
INSTRUCTION_SETS = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}
# What computes in which case, where an instruction set leaves a part to another one.
REGIMES = {
    "amx": "amx from 5 rows of x, avx512bf16 below, avx512 for float16 and float32",
    "avx512bf16": "avx512bf16, avx512 for float16 and float32",
    "neonbf16": "neonbf16, neon for float16 and float32",
}
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # of Linux on x86-64


@dataclass(frozen=True, slots=True)
class Status:
    """What the kernels are on this machine.

    Attributes:
        native: whether the compiled operators are installed; without them every call is plain torch.
        instruction_set: what they use here (``amx``, ``avx512bf16``, ``avx512``, ``avx2``, ``neonbf16``, ``neon``,
            ``portable``), or ``torch``.
        reason: why they are not installed; empty when they are.
        note: why a better instruction set of this processor is not used; empty when the best one is.
    """

    native: bool
    instruction_set: str
    reason: str = ""
    note: str = ""

    @property
    def regimes(self) -> str:
        """Which instruction set computes what, in words."""
        return REGIMES.get(self.instruction_set, self.instruction_set)


def library() -> Path | None:
    """The compiled library of this Python, None when the package was installed without."""
    return min(PACKAGE.glob("_C.*.so"), default=None)


@cache
def status() -> Status:
    """What this machine will use; reads the package's folder and ``/proc/cpuinfo``, imports no torch.

    Where the processor has AMX, the system is asked for the permission to use its tiles, as the kernels ask for it.
    """
    if library() is None:
        note = PACKAGE / "build-failure.txt"
        reason = note.read_text().strip().splitlines()[0] if note.exists() else "built without a compiler"
        return Status(False, "torch", reason)
    forced = os.environ.get("QUANTSERVE_KERNELS_ISA")
    if forced:
        return Status(True, forced)
    flags, known = _flags(), INSTRUCTION_SETS.get(platform.machine(), ())
    names = [*(name for name, needed in known if flags.issuperset(needed)), "portable"]
    refusal = amx_refusal() if names[0] == "amx" else ""
    return Status(True, names[1], note=refusal) if refusal else Status(True, names[0])


def amx_refusal() -> str:
    """Asks Linux for the permission to use AMX tiles; returns why it refuses, "" when this process may use them."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0:
            return ""
        why = os.strerror(ctypes.get_errno())
    except (OSError, AttributeError) as error:
        why = str(error)
    return (
        "this processor has AMX, but arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) is refused here "
        f"({why}); AMX needs Linux 5.16 and a container whose seccomp profile allows the call"
    )


def _flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))), "").split())
