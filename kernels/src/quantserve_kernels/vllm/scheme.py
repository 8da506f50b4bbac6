"""What is read of a scheme, the stored tensors of a linear as data; quantserve's `Scheme` is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from functools import reduce
from typing import Protocol

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
}
"""The dtypes of safetensors, by its names."""


class Dim(Protocol):
    """A dimension that grows with the linear: `per` elements of ``n``, ``k`` or ``nk`` (flattened) for each index.

    `partial`: the last index may stand for fewer.
    """

    @property
    def axis(self) -> str: ...  # noqa: D102

    @property
    def per(self) -> Fraction: ...  # noqa: D102

    @property
    def partial(self) -> bool: ...  # noqa: D102


class Part(Protocol):
    """One stored tensor: its shape (None: only the file knows the length) and the dtypes it may have."""

    @property
    def shape(self) -> tuple[Dim | int | None, ...]: ...  # noqa: D102

    @property
    def dtypes(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def optional(self) -> bool: ...  # noqa: D102

    def sizes(self, n: int, k: int) -> tuple[int | None, ...]:
        """The shape for a linear [n, k]."""

    def fits(self, shape: tuple[int, ...], n: int, k: int) -> bool:
        """Whether a stored shape is this part's for a linear [n, k]."""


class Scheme(Protocol):
    """The tensors of one linear by suffix, each with alternatives of which the first is the engine's shape."""

    @property
    def parts(self) -> Mapping[str, Part | tuple[Part, ...]]: ...  # noqa: D102

    @property
    def bits(self) -> float: ...  # noqa: D102

    @property
    def group_size(self) -> int: ...  # noqa: D102

    def alternatives(self, suffix: str) -> tuple[Part, ...]:
        """The parts that may be stored under a suffix."""

    def required(self) -> tuple[str, ...]:
        """The suffixes that every linear must have."""


def of_one_expert(scheme: Scheme) -> Scheme:
    """The scheme without the stacked experts in front of its parts."""
    parts = {suffix: tuple(_of_one(part) for part in scheme.alternatives(suffix)) for suffix in scheme.parts}
    return replace(scheme, parts=parts)  # type: ignore[type-var]


def _of_one(part: Part) -> Part:
    first, *others = part.shape or (None,)
    stacked = first is not None and not isinstance(first, int) and first.axis == "e"
    return replace(part, shape=tuple(others)) if stacked else part  # type: ignore[type-var]


def dims(part: Part) -> list[Dim]:
    """The dimensions that grow with the linear."""
    return [one for one in part.shape if one is not None and not isinstance(one, int)]


def dtypes(scheme: Scheme, suffix: str) -> list[torch.dtype]:
    """What a tensor of a suffix may be."""
    return list(dict.fromkeys(DTYPES[dtype] for part in scheme.alternatives(suffix) for dtype in part.dtypes))


def common_dtype(scheme: Scheme, suffix: str) -> torch.dtype:
    """A dtype that holds whatever a tensor of a suffix may be."""
    return reduce(torch.promote_types, dtypes(scheme, suffix))
