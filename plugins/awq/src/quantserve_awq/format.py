"""How AWQ stores a linear, for both sides of the plugin."""

from __future__ import annotations

from functools import lru_cache

from quantserve.api import K, N, Part, Scheme

PER_WORD = 8
"""4-bit codes in an int32 word, along N."""


@lru_cache
def awq_scheme(group: int | None) -> Scheme:
    """A linear in the layout that AutoAWQ (arXiv 2306.00978) calls gemm: int32 ``qweight`` [k, n / 8], ``qzeros``
    [k / group, n / 8] and float ``scales`` [k / group, n].

    Args:
        group: inputs that share a scale; -1 for all of K, None when only the files know.
    """
    rows = None if group is None else 1 if group == -1 else K(group)
    return Scheme(
        {
            "qweight": Part((K(), N(PER_WORD)), ("I32",)),
            "qzeros": Part((rows, N(PER_WORD)), ("I32",)),
            "scales": Part((rows, N()), ("F16", "BF16")),
        },
        bits=4,
        group_size=group or -1,
        scales="channel" if group == -1 else "group",
    )
