"""The tensors of a GPTQ linear, as data: what the checks and vLLM's side both read. Imports no torch."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

from quantserve.api import K, N, Part, Scheme

WORDS = ("I32",)
FLOATS = ("F16", "BF16", "F32")


@lru_cache
def gptq_scheme(bits: int, group: int, *, ordered: bool = False) -> Scheme:
    """A linear as AutoGPTQ stores it (GPTQ: arXiv 2210.17323).

    int32 ``qweight`` [k * bits / 32, n] and ``qzeros`` [k / group, n * bits / 32], bit streams along K and N; float
    ``scales`` [k / group, n]; int32 ``g_idx`` [k], the group of each input.

    Args:
        bits: 2, 3, 4 or 8.
        group: inputs that share a scale; -1 for all of K.
        ordered: whether inputs were quantized in the order of their activations, so that only ``g_idx`` tells an
            input's group.
    """
    rows, per_word = 1 if group == -1 else K(group), Fraction(32, bits)
    return Scheme(
        {
            "qweight": Part((K(per_word), N()), WORDS),
            "qzeros": Part((rows, N(per_word)), WORDS),
            "scales": Part((rows, N()), FLOATS),
            "g_idx": Part((K(),), WORDS, optional=not ordered),
        },
        bits=bits,
        group_size=group,
        scales="channel" if group == -1 else "group",
    )
