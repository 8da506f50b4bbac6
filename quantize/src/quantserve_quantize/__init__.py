"""Quantize checkpoints. A plugin's quantizer is a `Quantizer`; the rest (reading, calibrating, writing) is here, once.

`quantserve quantize` finds the quantizer through the hook ``quantserve_quantizer``, which names the class as
``"module:Class"``. The names of this package import torch when they are used: `quantserve list` imports its commands.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantserve_quantize.options import option
    from quantserve_quantize.quantizer import Block, Need, Quantized, Quantizer, Statistics, unquantized

__all__ = ["Block", "Need", "Quantized", "Quantizer", "Statistics", "option", "unquantized"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from quantserve_quantize import options, quantizer

    return getattr(options if name == "option" else quantizer, name)
