"""The operators `torch.ops.quantserve_kernels.*`: loaded from the compiled library, or defined in plain torch.

    codebook_linear(x [..., k], codes, table, scales, zeros, rows, cols, vals, bias, bits, n, k, group_size) -> [..., n]
    codebook_experts(x [t, k], topk_ids, topk_weights, activation, w13, w13_bias, w2, w2_bias) -> [t, k]; CPU only, each
        weight as its seven tensors, and their numbers at the end
    pack_codes(codes uint8 [n, k], bits, group_size, columns) -> uint8, in the layout of csrc/kernel.h; CPU only

Each has a fake implementation, so torch.compile and CUDA graphs see one opaque node; which kernel runs for how many
rows is decided inside, at run time.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quantserve_kernels import _fallback
from quantserve_kernels._arguments import EXPERTS, LINEAR, PACK, of_linear
from quantserve_kernels._checks import check_experts, check_linear
from quantserve_kernels._status import library

NAMESPACE = "quantserve_kernels"


@cache
def load() -> torch.library.Library:
    """Make the operators known to this process; safe to call any number of times.

    Raises:
        OSError: the compiled library does not load, for example because it was built for another torch.
        ValueError: QUANTSERVE_KERNELS_ISA names an instruction set this processor lacks.
    """
    path = library()
    definitions = torch.library.Library(NAMESPACE, "FRAGMENT")
    if path is not None:
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            reason = error.__cause__ or error  # torch's own message is the path alone
            raise OSError(
                f"{path.name} of quantserve-kernels does not load with torch {torch.__version__}: {reason}\n"
                "  fix: build it again for this torch: pip install --no-build-isolation --force-reinstall --no-deps "
                "quantserve-kernels"
            ) from error
        if forced := os.environ.get("QUANTSERVE_KERNELS_ISA"):
            torch.ops.quantserve_kernels.isa(forced)
    else:
        definitions.define(LINEAR)
        definitions.define(EXPERTS)
        definitions.define(PACK)
        definitions.impl("codebook_linear", _plain_linear, "CPU")
        definitions.impl("codebook_experts", _plain_experts, "CPU")
        definitions.impl("pack_codes", _fallback.pack_codes, "CPU")
    definitions.impl("codebook_linear", _cuda_linear, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::codebook_linear", _fake_linear, lib=definitions)
    torch.library.register_fake(f"{NAMESPACE}::codebook_experts", _fake_experts, lib=definitions)
    return definitions


def instruction_set(name: str = "") -> str:
    """The instruction set in use on CPUs; with a name, choose that one first (for tests and benchmarks).

    Raises:
        ValueError: this processor lacks it, or the operators are not compiled; names what is known.
    """
    load()
    if library() is None:
        if name not in ("", "torch"):
            raise ValueError(f"instruction set {name} is not available: the operators are not compiled; known: torch")
        return "torch"
    chosen: list[str] = torch.ops.quantserve_kernels.isa(name)
    return chosen[0]


def instruction_sets() -> list[str]:
    """Those this processor has, best last; ``torch`` alone when nothing was compiled."""
    load()
    return torch.ops.quantserve_kernels.isa("")[1:] if library() is not None else ["torch"]


def allocate_codes(size: int) -> Tensor:
    """Uninitialized uint8 [size] for the codes of a whole layer, in huge pages where the system grants them."""
    if library() is None:
        return torch.empty(size, dtype=torch.uint8)
    return torch.ops.quantserve_kernels.allocate_codes(size)


def _fake_linear(*arguments: Any) -> Tensor:
    x, weight, _ = of_linear(arguments)
    return x.new_empty((*x.shape[:-1], weight.n))


def _fake_experts(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _plain_linear(*arguments: Any) -> Tensor:
    check_linear(*arguments)
    return _fallback.codebook_linear(*arguments)


def _plain_experts(*arguments: Any) -> Tensor:
    check_experts(*arguments)
    return _fallback.codebook_experts(*arguments)


def _cuda_linear(*arguments: Any) -> Tensor:
    layout = check_linear(*arguments)
    x, weight, bias = of_linear(arguments)
    codes, table, scales, zeros, rows, cols, vals, bits, n, k, group_size = weight
    flat = x.reshape(-1, k).contiguous()
    sparse = None if rows is None or cols is None or vals is None else (rows, cols, vals)
    if layout == "tensor cores":
        from quantserve_kernels import _cuda

        wide = None if bias is None else bias.float().contiguous()
        return _cuda.linear(flat, codes, table, sparse, wide, bits, n).view(*x.shape[:-1], n)
    from quantserve_kernels import _triton

    y = _triton.linear(flat, codes, table, scales, zeros, bits, n, k, k if group_size == -1 else group_size)
    if sparse is not None:
        y = y + _triton.sparse_linear(flat, *sparse)
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).view(*x.shape[:-1], n)
