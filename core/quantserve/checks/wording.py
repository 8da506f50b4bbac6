"""How tensors and counts are written in findings. `Finding` itself makes text from files harmless."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from quantserve.model.linear import expert_of

if TYPE_CHECKING:
    from quantserve.checkpoint import Tensor

NAMED = 8


def named(offenders: Sequence[str]) -> tuple[str, ...]:
    """The first offenders, and how many more there are."""
    more = len(offenders) - NAMED
    return tuple(offenders[:NAMED]) + ((f"and {more} more",) if more > 0 else ())


def shown(tensor: Tensor) -> str:
    """Name and shape of a tensor, in at most some 250 characters."""
    shape = ", ".join(str(size) for size in tensor.shape[:8]) + (", ..." if len(tensor.shape) > 8 else "")
    return f"{tensor.name if len(tensor.name) <= 160 else tensor.name[:157] + '...'} [{shape}]"


def counted(count: int, singular: str) -> str:
    """``1 tensor``, ``3 tensors``."""
    return f"{count} {singular}" if count == 1 else f"{count} {singular}s"


def have(count: int, singular: str) -> str:
    """``1 tensor has``, ``3 tensors have``."""
    return counted(count, singular) + (" has" if count == 1 else " have")


def are(count: int, singular: str) -> str:
    """``1 tensor is``, ``3 tensors are``."""
    return counted(count, singular) + (" is" if count == 1 else " are")


def and_experts(text: str, count: int) -> str:
    """A text about one of so many experts that are alike."""
    return text if count < 2 else f"{text} (and {counted(count - 1, 'more expert')})"


def by_experts(names: Iterable[str]) -> list[str]:
    """Names of linears, with the experts of a layer as one: ``...experts.0.up_proj (and 7 more experts)``."""
    found: dict[object, list[str]] = {}
    for name in names:
        expert = expert_of(name)
        found.setdefault((expert[0], expert[2]) if expert else name, []).append(name)
    return [and_experts(alike[0], len(alike)) for alike in found.values()]
