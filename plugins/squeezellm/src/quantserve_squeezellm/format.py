"""The tensors of a SqueezeLLM linear, as data: what the checks and vLLM's side both read. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from quantserve.api import K, N, Part, Scheme

BITS = (3, 4)
SPARSE = {"nnz": ("rows", "cols", "vals"), "full_rows": ("full_rows", "full_row_indices")}
"""The parts added to the dense one, by what config.json counts of them.

``quantization_config["sparse"]``, {module: {"nnz": int, "full_rows": int}}, comes from our converter and quantizer.
Tensors that it counts and that are missing stop the engine, and vLLM's compile cache tells two checkpoints in one
folder apart.
"""

FLOATS = ("F32", "F16", "BF16")


def width(config: Mapping[str, Any]) -> int:
    """Bits of a quantization config; ValueError where it gives none that SqueezeLLM has."""
    bits = config.get("wbits", config.get("bits"))
    if isinstance(bits, bool) or bits not in BITS:
        raise ValueError(f'squeezellm: the quantization config has "wbits" {bits!r}. Fix: make it 3 or 4')
    return int(bits)


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
