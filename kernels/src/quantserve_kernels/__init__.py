"""One codebook GEMM for weight-only quantized linears: `y = x @ W.T`, with W decoded from its codes on the fly.

    weight = from_awq(qweight, qzeros, scales)       # or from_squeezellm, from_gptq, from_nf4, from_fp8, from_fp4, pack
    y = linear(x, weight)

Importing this package imports no torch: `status` answers from files, so that `quantserve check` stays fast. Everything
else is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from quantserve_kernels._status import Status, status

if TYPE_CHECKING:
    from quantserve_kernels._experts import ACTIVATIONS, concatenate, experts
    from quantserve_kernels._formats import (
        NF4,
        from_awq,
        from_fp4,
        from_fp8,
        from_gptq,
        from_nf4,
        from_squeezellm,
        input_order,
        pack_stream,
        unpack_stream,
    )
    from quantserve_kernels._ops import instruction_set, load
    from quantserve_kernels._weight import BITS, Linear, PackedWeight, check_bias, linear, pack

__all__ = [
    "ACTIVATIONS",
    "BITS",
    "NF4",
    "Linear",
    "PackedWeight",
    "Status",
    "check_bias",
    "concatenate",
    "experts",
    "from_awq",
    "from_fp4",
    "from_fp8",
    "from_gptq",
    "from_nf4",
    "from_squeezellm",
    "input_order",
    "instruction_set",
    "linear",
    "load",
    "pack",
    "pack_stream",
    "status",
    "unpack_stream",
]

_HOMES = {
    "_experts": ("ACTIVATIONS", "concatenate", "experts"),
    "_formats": (
        "NF4",
        "from_awq",
        "from_fp4",
        "from_fp8",
        "from_gptq",
        "from_nf4",
        "from_squeezellm",
        "input_order",
        "pack_stream",
        "unpack_stream",
    ),
    "_ops": ("instruction_set", "load"),
    "_weight": ("BITS", "Linear", "PackedWeight", "check_bias", "linear", "pack"),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
