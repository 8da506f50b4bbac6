"""Accuracy: our error against float64 beside that of torch's bf16 linear on the same, dequantized, weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.formats import FORMATS
from benchmarks.kernels.shapes import ERROR_BATCHES, ERROR_SHAPES
from quantserve_kernels import instruction_set, linear

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def measure(formats: Sequence[str], isas: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """Per format and shape the figures of every batch, input type and instruction set.

    x has bfloat16 values in every type, so that all of them have the same float64 result and the same reference: the
    norm of the error of torch's bfloat16 linear, whose weight and result are rounded to bfloat16.
    """
    for name in formats:
        for n, k in ERROR_SHAPES:
            weight = FORMATS[name].make(n, k)
            exact = weight.dequantize(torch.float64)
            rounded = exact.bfloat16()
            found = []
            for batch in ERROR_BATCHES:
                x = torch.randn(batch, k, generator=torch.Generator().manual_seed(batch)).bfloat16()
                truth = x.double() @ exact.t()
                reference = relative(torch.nn.functional.linear(x, rounded), truth)
                for isa in isas:
                    instruction_set(isa)
                    for dtype, kind in DTYPES.items():
                        error = relative(linear(x.to(kind), weight), truth)
                        found.append(
                            {
                                "format": name,
                                "n": n,
                                "k": k,
                                "batch": batch,
                                "isa": isa,
                                "dtype": dtype,
                                "error": error,
                                "reference": reference,
                            }
                        )
            yield found


def relative(y: Tensor, truth: Tensor) -> float:
    """The norm of the difference over the norm."""
    return float((y.double() - truth).norm() / truth.norm())
