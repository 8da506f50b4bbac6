"""Quantize checkpoints. A plugin's quantizer is a `Quantizer`; the rest (reading, calibrating, writing) is here, once.

`quantserve quantize` finds the quantizer through the hook ``quantserve_quantizer``, which names the class as
``"module:Class"``. Importing this package imports torch.
"""

from quantserve_quantize.options import option
from quantserve_quantize.quantizer import Block, Need, Quantized, Quantizer, Statistics

__all__ = ["Block", "Need", "Quantized", "Quantizer", "Statistics", "option"]
