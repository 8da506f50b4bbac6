"""From seconds per round to medians, ratios, and what they are held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

Cell = Mapping[str, Any]
Run = Mapping[str, Any]

# The names of the contenders. This module imports no torch, so that tables can be drawn anew without it.
READ = "memory"
TORCH = "torch bf16"
VLLM_BF16 = "vLLM bf16"
VLLM_AWQ = "vLLM AWQ"
DENSE, SMALLER, SPARSE, AWQ = "squeezellm-4", "squeezellm-3", "squeezellm-4-sparse", "awq"
HEADLINE = (DENSE, AWQ)
JUDGED = (DENSE, SMALLER, SPARSE, AWQ)

BUSY = 0.1  # cores that others may use without doubt


def place(cell: Cell) -> str:
    """`7b qkv`."""
    return f"{cell['shape']['model']} {cell['shape']['layer']}"


def seconds(cell: Cell, name: str) -> float:
    """The median over the rounds."""
    return float(median(cell["seconds"][name]))


def speedup(cell: Cell, name: str, reference: str) -> float | None:
    """How many times as fast: the median of the ratios within a round; None where one of the two was not measured."""
    own, theirs = cell["seconds"].get(name), cell["seconds"].get(reference)
    return float(median(b / a for a, b in zip(own, theirs, strict=True))) if own and theirs else None


def gigabytes(cell: Cell, name: str) -> float:
    """GB of weight read per second."""
    return float(cell["bytes"][name] / 1e9 / seconds(cell, name))


def share(cell: Cell, name: str) -> float | None:
    """That speed relative to the read bandwidth of the same round, median."""
    ratio = speedup(cell, name, READ)
    return None if ratio is None else float(ratio * cell["bytes"][name] / cell["bytes"][READ])


def read_speed(run: Run) -> float | None:
    """GB/s of the memory itself over all cells of batch 1, median."""
    found = [gigabytes(cell, READ) for cell in run["cells"] if READ in cell["seconds"]]
    return median(found) if found else None


def spread(run: Run) -> float | None:
    """How far apart the quartiles of a contender's times lie, relative to their median: the median over all cells."""
    found = []
    for cell in run["cells"]:
        for values in cell["seconds"].values():
            if len(values) >= 4:
                low, _, high = quantiles(values, n=4)
                found.append((high - low) / median(values))
    return median(found) if found else None


def doubts(run: Run) -> list[str]:
    """Why the figures of a run should not be trusted; empty for a quiet machine."""
    out = []
    quiet = run.get("quiet") or {"others": 0.0, "stolen": 0.0}
    if quiet["others"] + quiet["stolen"] > BUSY:
        out.append("others used the cores while this was measured")
    shares = [share(cell, name) or 0.0 for cell in run["cells"] for name in cell["seconds"]]
    if max(shares, default=0.0) > 1.05:
        out.append(f"a contender reads {max(shares):.0%} of what the memory gives, so the reads were disturbed")
    return out


# --- targets --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A measured figure beside its bound.

    Attributes:
        target: the key in `TARGETS`.
        where: shape, format, batch.
        value: measured.
        bound: it has to reach.
        most: it must not exceed the bound, instead.
    """

    target: str
    where: str
    value: float
    bound: float
    most: bool = False

    @property
    def passed(self) -> bool:
        """Whether it is met as shown, with two digits after the point."""
        value = round(self.value, 2)
        return value <= self.bound if self.most else value >= self.bound


TARGETS = {
    "error": "error against float64, at most 1.05x that of torch bf16",
    "torch": "batch 1: squeezellm-4 and awq, at least 5x torch bf16",
    "vllm": "batch 1: squeezellm-4 and awq, at least 5x vLLM AWQ",
    "bandwidth": "batch 1: squeezellm-4 and awq, at least 70 % of the read bandwidth",
    "small": "batch 2 to 16: at least 1.5x torch bf16",
    "large": "batch 32 and more: at least torch bf16",
    "three": "batch 1: squeezellm-3 takes at most the time of squeezellm-4",
    "sparse": "batch 1: the sparse part adds at most 15 % to the time",
    "avx2": "batch 1: AVX2 alone, at least 2x torch bf16",
}


def speed_check(cell: Cell, name: str) -> Check | None:
    """The target of a format's speed over torch bf16 at the cell's batch size, if it has one."""
    value, batch = speedup(cell, name, TORCH), cell["batch"]
    if value is None or name not in (HEADLINE if batch == 1 else JUDGED):
        return None
    target, bound = ("torch", 5.0) if batch == 1 else ("small", 1.5) if batch <= 16 else ("large", 1.0)
    return Check(target, f"{place(cell)}, {name}, batch {batch}", value, bound)


def vllm_check(cell: Cell, name: str) -> Check | None:
    """The target against vLLM's AWQ operator."""
    value = speedup(cell, name, VLLM_AWQ)
    wanted = value is not None and name in HEADLINE and cell["batch"] == 1
    return Check("vllm", f"{place(cell)}, {name}", value, 5.0) if wanted and value is not None else None


def share_check(cell: Cell, name: str) -> Check | None:
    """The target for the share of the read bandwidth."""
    value = share(cell, name)
    return Check("bandwidth", f"{place(cell)}, {name}", value, 0.70) if value is not None and name in HEADLINE else None


def time_check(cell: Cell, name: str) -> Check | None:
    """The target for 3 bits and for the sparse part: the time relative to squeezellm-4."""
    value = speedup(cell, DENSE, name)
    if value is None or cell["batch"] != 1 or name not in (SMALLER, SPARSE):
        return None
    target, bound = ("three", 1.0) if name == SMALLER else ("sparse", 1.15)
    return Check(target, f"{place(cell)}", value, bound, most=True)


def isa_check(cell: Cell, name: str, isa: str) -> Check | None:
    """The target for a forced instruction set."""
    value = speedup(cell, f"{name} @{isa}", TORCH)
    wanted = isa == "avx2" and name in JUDGED
    return Check("avx2", f"{place(cell)}, {name}", value, 2.0) if wanted and value is not None else None


def error_check(found: Mapping[str, Any]) -> Check:
    """The target of one error."""
    where = f"{found['format']}, {found['dtype']}, {found['n']}x{found['k']}, batch {found['batch']}, {found['isa']}"
    return Check("error", where, found["error"] / found["reference"], 1.05, most=True)


def checks(run: Run, formats: Sequence[str]) -> Iterator[Check]:
    """All of a run."""
    for cell in run["cells"]:
        for name in formats:
            for check in (speed_check, vllm_check, share_check, time_check):
                if (found := check(cell, name)) is not None:
                    yield found
    for cell in run["isa_cells"]:
        for name in formats:
            for isa in run["isas"]:
                if (found := isa_check(cell, name, isa)) is not None:
                    yield found
