"""The formats that are measured; `weights` makes them. Imports no torch, so that tables are drawn without it."""

from __future__ import annotations

from benchmarks.console import BenchError
from benchmarks.kernels.formats import NF4_BLOCK
from benchmarks.kernels.formats import SPARSE as SPARSE_SHARE

CUBLAS = "cuBLAS bf16"  # the contender that all others are held against
FOUR, THREE, SPARSE, NF4 = "squeezellm-4", "squeezellm-3", "squeezellm-4-sparse", "nf4"
DEFAULT = (FOUR, THREE, SPARSE)
ABOUT = {
    FOUR: "SqueezeLLM, 4 bits",
    THREE: "SqueezeLLM, 3 bits",
    SPARSE: f"SqueezeLLM, 4 bits and {SPARSE_SHARE:.2%} sparse",
    NF4: f"NF4, blocks of {NF4_BLOCK}",
}


def choose(names: str | None) -> list[str]:
    """The names of a comma list, in the order of the table; the default ones without a list.

    Raises:
        BenchError: an unknown name; lists the known ones.
    """
    if names is None:
        return list(DEFAULT)
    wanted = list(ABOUT) if names == "all" else [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in ABOUT]
    if unknown or not wanted:
        known = ", ".join([*ABOUT, "all"])
        raise BenchError(f"unknown format {', '.join(unknown) or '(none given)'}; known: {known}")
    return [name for name in ABOUT if name in wanted]
