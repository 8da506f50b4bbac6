"""Checkpoints in float32, to compare what an engine makes of a quantized one with transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from quantserve_quantize.dequantized import Dequantized
from quantserve_quantize.quantizer import Quantizer


def write_plain(source: Path, destination: Path, weights: Mapping[str, Tensor]) -> Path:
    """The folder of a quantized checkpoint with other weights.

    Args:
        source: its config.json, less what it says of quantization, and its tokenizer are kept.
        destination: a new folder.
        weights: all tensors; stored in float32.

    Returns:
        The destination.
    """
    shutil.copytree(source, destination, ignore=shutil.ignore_patterns("*.safetensors", "*quant*config.json"))
    config = json.loads((source / "config.json").read_text())
    for key in ("quantization_config", "torch_dtype"):
        config.pop(key, None)
    (destination / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    floats = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    save_file(floats, destination / "model.safetensors", {"format": "pt"})
    return destination


def write_dequantized(source: Path, destination: Path, quantizer: type[Quantizer]) -> Path:
    """A checkpoint with the weights that a quantizer of this project makes of a quantized one; see `write_plain`."""
    found = Dequantized(source, quantizer)
    stored = {name for parts in found.parts.values() for suffix, name in parts.items() if suffix != "bias"}
    names = {name for name in found.files if name not in stored} | {f"{module}.weight" for module in found.parts}
    return write_plain(source, destination, {name: found.finite(name) for name in sorted(names)})
