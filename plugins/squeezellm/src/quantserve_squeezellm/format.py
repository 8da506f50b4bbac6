"""The tensors of a SqueezeLLM linear, as data: what the checks and vLLM's side both read. Imports no torch."""

from __future__ import annotations

from fractions import Fraction

from quantserve.api import K, N, Part, Scheme

BITS = (3, 4)
SPARSE = {"nnz": ("rows", "cols", "vals"), "full_rows": ("full_rows", "full_row_indices")}
"""The parts added to the dense one, by what config.json counts of them."""

FLOATS = ("F32", "F16", "BF16")


def scheme(bits: int) -> Scheme:
    """A codebook per output channel, codes packed along K, and perhaps sparse parts whose length only the file knows.

    Args:
        bits: 3 or 4.
    """
    return Scheme(
        {
            "qweight": Part((K(Fraction(32, bits)), N()), ("I32",)),
            "lookup_table": Part((N(), 2**bits), FLOATS),
            "rows": Part((None,), ("I32",), optional=True),  # n + 1
            "cols": Part((None,), ("I32",), optional=True),
            "vals": Part((None,), FLOATS, optional=True),
            "full_rows": Part((K(), None), FLOATS, optional=True),
            "full_row_indices": Part((None,), ("I32",), optional=True),
            "startrows": Part((None,), ("I32",), optional=True),  # balances GPU threads, carries no weights
        },
        bits=bits,
        scales="none",
    )
