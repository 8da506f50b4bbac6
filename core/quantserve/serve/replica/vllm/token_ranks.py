"""Counts ranks of tokens without a compiler on CPUs; one of `patches.PATCHES`.

vLLM compiles the function that finds the rank of a token for log-probabilities when the first request asks for them.
On a CPU the compiler runs for seconds, in which the engine gives no token to anybody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch import Tensor

ROWS: Final = 64
"""Rows whose comparison is held in memory at once, a byte for each entry of the vocabulary."""


def count_at_least(x: Tensor, values: Tensor) -> Any:
    """Entries of each row that are at least the row's value, as vLLM's `batched_count_greater_than` counts them.

    Args:
        x: log-probabilities [rows, vocabulary].
        values: one for each row [rows, 1].

    Returns:
        int64 [rows].
    """
    import torch

    parts = zip(x.split(ROWS), values.split(ROWS), strict=True)
    return torch.cat([(some >= value).sum(-1) for some, value in parts])


def count_without_compiler() -> None:
    """Let vLLM's sampler count with `count_at_least`."""
    from vllm.v1.sample import sampler

    sampler.batched_count_greater_than = count_at_least
