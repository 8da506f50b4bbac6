"""How AWQ stores a linear, for both sides of the plugin."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

from quantserve.api import K, N, Part, Scheme

WORDS = ("I32",)
FLOATS = ("F16", "BF16")
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
            "qweight": Part((K(), N(PER_WORD)), WORDS),
            "qzeros": Part((rows, N(PER_WORD)), WORDS),
            "scales": Part((rows, N()), FLOATS),
        },
        bits=4,
        group_size=group or -1,
        scales="channel" if group == -1 else "group",
    )


GEMM = awq_scheme(None)

OTHER_LAYOUTS = {
    "gemv_fast": Scheme({"qweight": Part((N(4), K()), ("I16",)), "scales": Part((None, None), FLOATS)}, bits=4),
    "marlin": Scheme(
        {"qweight": Part((K(16), N(Fraction(1, 2))), WORDS), "scales": Part((None, None), FLOATS)}, bits=4
    ),
    "gemv": Scheme({"qweight": Part((N(), K(8)), WORDS), "scales": Part((N(), None), FLOATS)}, bits=4),
    "GPTQ": Scheme({"qweight": Part((K(8), N()), WORDS), "scales": Part((None, N()), FLOATS)}, bits=4),
    "compressed-tensors": Scheme({"weight_packed": Part((None, None), WORDS)}, bits=4),
}
"""What else 4-bit files hold under the same names; vLLM would read it as gemm."""

OTHER_METHODS = ("GPTQ", "compressed-tensors")
