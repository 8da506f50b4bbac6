"""Tensor lists in a few lines: numbers in names as ranges, ``model.layers.{0-31}.mlp.experts.{0-7}.w1.weight``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Spec = tuple[str, tuple[int, ...]]
"""(safetensors dtype, shape)"""

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_RANGES = re.compile(r"\{([\d,-]+)\}")


def fold(tensors: Mapping[str, Spec]) -> dict[str, list[object]]:
    """Pattern -> [dtype, shape] of all tensors; `unfold` is its inverse, the order aside."""
    alike: dict[tuple[str, Spec], list[tuple[int, ...]]] = {}
    for name, (dtype, shape) in tensors.items():
        skeleton = _NUMBER.sub("{}", name)
        alike.setdefault((skeleton, (dtype, tuple(shape))), []).append(tuple(map(int, _NUMBER.findall(name))))
    folded: dict[str, list[object]] = {}
    for (skeleton, (dtype, shape)), numbers in alike.items():
        for slots in _products(numbers):
            folded[skeleton.format(*slots)] = [dtype, list(shape)]
    return folded


def unfold(folded: Mapping[str, Any]) -> dict[str, Spec]:
    """Name -> (dtype, shape) of every tensor that the patterns stand for."""
    tensors: dict[str, Spec] = {}
    for pattern, (dtype, shape) in folded.items():
        spec: Spec = (dtype, tuple(shape))
        for name in names(pattern):
            tensors[name] = spec
    return tensors


def names(pattern: str) -> Iterator[str]:
    """All names a pattern stands for."""
    parts = _RANGES.split(pattern)
    if len(parts) == 1:
        yield pattern
        return
    choices = [_numbers(part) if i % 2 else [part] for i, part in enumerate(parts)]
    for chosen in itertools.product(*choices):
        yield "".join(chosen)


def _products(numbers: Iterable[tuple[int, ...]]) -> Iterator[tuple[str, ...]]:
    """Tuples of numbers as products of ranges."""
    by_first: dict[int, list[tuple[int, ...]]] = {}
    for row in numbers:
        if row:
            by_first.setdefault(row[0], []).append(row[1:])
    if not by_first:
        yield ()
        return
    same: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    for first, rests in by_first.items():
        same.setdefault(tuple(_products(rests)), []).append(first)
    for rests_as_ranges, firsts in same.items():
        for slots in rests_as_ranges:
            yield ("{" + _ranges(sorted(firsts)) + "}" if len(firsts) > 1 else str(firsts[0]), *slots)


def _ranges(numbers: list[int]) -> str:
    parts = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        listed = [number for _, number in run]
        parts.append(f"{listed[0]}-{listed[-1]}" if len(listed) > 1 else str(listed[0]))
    return ",".join(parts)


def _numbers(ranges: str) -> list[str]:
    listed: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        listed += map(str, range(int(first), int(last or first) + 1))
    return listed
