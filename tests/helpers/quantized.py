"""Quantized checkpoints of small models, rounded without calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantserve_awq.quantizer import Awq, AwqOptions
from quantserve_quantize.run import Asked, quantize
from quantserve_squeezellm.quantizer import SqueezeLLM, SqueezeLLMOptions


def awq(source: Path, out: Path, **options: Any) -> None:
    """AWQ by rounding to nearest, unless options say otherwise."""
    quantize(
        source, out, Awq(AwqOptions(**{"scales": "none", "clip": False, "refine": False, **options})), "awq", Asked()
    )


def squeezellm(source: Path, out: Path, **options: Any) -> None:
    """SqueezeLLM by plain k-means."""
    quantize(source, out, SqueezeLLM(SqueezeLLMOptions(sensitivity="none", **options)), "squeezellm", Asked())
