"""How fast this machine reads memory: what no kernel that reads its weights from memory can beat.

Several loops read the same buffer, which is many times the cache and lies in huge pages as the kernels' codes do: a few
lines of C with one, two or four streams per thread, with and without prefetching, and torch's own sum. The fastest is
then timed among the kernels, call by call. Without a C compiler there is torch's sum.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from quantserve_kernels._ops import allocate_codes

SOURCE = Path(__file__).with_name("read.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
PIECE = 64 << 20  # bytes of one read
PIECES = 8
TRIES = 16
LOOPS = tuple((streams, ahead) for streams in (1, 2, 4) for ahead in (0, 4096))

Read = Callable[[int], Any]


class Memory:
    """A buffer and the fastest way to read it.

    Args:
        threads: that read together.

    Attributes:
        candidates: name of a loop -> GB/s, median.
        method: name of the fastest.
        reads: one per piece of the buffer, each reads it.
    """

    def __init__(self, threads: int) -> None:
        self.buffer = allocate_codes(PIECE * PIECES).fill_(1)
        words = self.buffer.view(torch.int64)

        def add(piece: int) -> Tensor:
            return words[piece * PIECE // 8 : (piece + 1) * PIECE // 8].sum()

        loops: dict[str, Read] = {"torch.sum of int64": add}
        if (library := compiled()) is not None:
            read_memory = library.read_memory
            read_memory.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_long]
            read_memory.restype = ctypes.c_longlong
            start = self.buffer.data_ptr()

            def loop(streams: int, ahead: int) -> Read:
                return lambda piece: read_memory(start + piece * PIECE, PIECE, threads, streams, ahead)

            for streams, ahead in LOOPS:
                suffix = f", prefetching {ahead} bytes ahead" if ahead else ""
                loops[f"C, {streams} stream{'s' if streams > 1 else ''} per thread{suffix}"] = loop(streams, ahead)
        self.candidates = {name: PIECE / 1e9 / seconds for name, seconds in times(loops).items()}
        self.method = max(self.candidates, key=lambda name: self.candidates[name])
        fastest = loops[self.method]
        self.reads = [lambda _x, piece=piece: fastest(piece) for piece in range(PIECES)]


def times(loops: dict[str, Read]) -> dict[str, float]:
    """Loop -> median seconds for one piece; they alternate, and the first reads of each do not count."""
    taken: dict[str, list[float]] = {name: [] for name in loops}
    count = 0
    for number in range(TRIES + 2):
        for name, read in loops.items():
            began = time.perf_counter()
            read(count % PIECES)
            if number >= 2:
                taken[name].append(time.perf_counter() - began)
            count += 1
    return {name: median(seconds) for name, seconds in taken.items()}


def compiled() -> ctypes.CDLL | None:
    """The loop in C; None where no compiler takes it."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "read.so"
        for compiler in filter(None, map(shutil.which, COMPILERS)):
            line = [compiler, *FLAGS, "-o", str(library), str(SOURCE)]
            if subprocess.run(line, capture_output=True, check=False).returncode == 0:
                return ctypes.CDLL(str(library))  # stays mapped when the file is gone
    return None
