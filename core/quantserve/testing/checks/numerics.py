"""What vLLM's layers compute, against the reference of the case."""

from __future__ import annotations

from collections.abc import Iterator

from quantserve.testing.check import check
from quantserve.testing.checks.seam import layer_problems
from quantserve.testing.subject import Subject


@check("N01-weights", "layers")
def weights(subject: Subject) -> Iterator[str]:
    """`Format.pack` gives weights that are the reference's bit for bit in float32, or within the case's tolerance.

    Fix: compute as the format is defined, in float32: `(code - zero) * scale`, in this order.
    """
    yield from layer_problems(subject, "weights")


@check("N02-layers", "layers")
def layers(subject: Subject) -> Iterator[str]:
    """Layers give x W^T for 1, 3, 17 and 64 rows of x, in every dtype of the method, within the dtype's rounding.

    Fix: compare the dtypes of `Method.dtypes` and of the engine side; look at the first row that differs.
    """
    yield from layer_problems(subject, "layers")


@check("N03-fused", "layers")
def fused(subject: Subject) -> Iterator[str]:
    """Gate and up, loaded into one layer as vLLM does, give the outputs of both.

    Fix: parameters need `output_dim` and the loader that vLLM gives; a scale without N belongs to one of the parts.
    """
    yield from layer_problems(subject, "fused")


@check("N04-missing-tensors", "layers")
def missing_tensors(subject: Subject) -> Iterator[str]:
    """A tensor that never arrives stops the engine with an error that names the layer.

    Fix: `quantserve_kernels.vllm.Format` does that; a method of your own fills its parameters with NaN and looks.
    """
    yield from layer_problems(subject, "missing")
