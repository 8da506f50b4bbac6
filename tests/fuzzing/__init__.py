"""Fuzzing of what reads untrusted files: structured inputs, made anew from a seed, each held against a reference.

A target makes an input from a random generator and judges it: what the reader gave against what the library that will
load the file gives. ``make fuzz`` runs them all; the tests run a few thousand inputs of each.
"""

from __future__ import annotations

import random
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Target:
    """A reader to fuzz.

    Attributes:
        make: an input from a random generator.
        judge: the verdict on an input, one word or two; an exception is a failure.
        limit_s: CPU seconds that no input may take.
    """

    name: str
    make: Callable[[random.Random], Any]
    judge: Callable[[Any], str]
    limit_s: float = 2.0


@dataclass
class Report:
    """What came of a run; `slowest` is seconds and the number of the input."""

    verdicts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, 0)
    seconds: float = 0.0

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {verdict}" for verdict, count in self.verdicts.most_common())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        slowest = f"slowest input {self.slowest[0] * 1000:.0f} ms (number {self.slowest[1]})"
        return f"{counts}; {len(self.failures)} failures; {self.seconds:.0f} s, {slowest}, peak memory {peak:,.0f} MiB"


def run(target: Target, count: int, seed: int = 0, first: int = 0, *, progress: bool = False) -> Report:
    """Judge `count` inputs, from number `first` on. The input of a number is the same in every run with one `seed`."""
    report = Report()
    began = said = time.monotonic()
    seen = 0
    for number in range(first, first + count):
        chance = random.Random(f"{target.name} {seed} {number}")
        given = target.make(chance)
        start = time.process_time()
        try:
            verdict = target.judge(given)
        except Exception as error:
            verdict = "failed"
            where = "".join(traceback.format_tb(error.__traceback__, limit=-5))
            report.failures.append(
                f"{target.name} seed {seed} number {number}: {type(error).__name__}: {error!s:.300}\n{where}"
            )
        taken = time.process_time() - start
        if taken > target.limit_s:
            report.failures.append(f"{target.name} seed {seed} number {number}: took {taken:.1f} s")
        if progress and len(report.failures) > seen:
            print(report.failures[-1], file=sys.stderr, flush=True)
            seen = len(report.failures)
        report.verdicts[verdict] += 1
        report.slowest = max(report.slowest, (taken, number))
        report.seconds = time.monotonic() - began
        if progress and time.monotonic() - said > 5:
            said = time.monotonic()
            print(f"{target.name}: {number - first + 1:,} of {count:,}; {report}", file=sys.stderr, flush=True)
    return report


def mutated(chance: random.Random, raw: bytes, most: int = 4) -> bytes:
    """`raw` with a few bytes changed, removed, repeated or put in."""
    data = bytearray(raw)
    for _ in range(chance.randint(1, most)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(6):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                data[at:at] = chance.randbytes(chance.randint(1, 4))
            case 2:
                del data[at : at + chance.randint(1, 8)]
            case 3:
                data[at:at] = data[at : at + chance.randint(1, 40)]
            case 4:
                if at < len(data):
                    data[at] ^= 1 << chance.randrange(8)
            case _:
                data[at : at + 8] = chance.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]).to_bytes(8, "little")
    return bytes(data)
