"""A quantized checkpoint as the weights for which it stands."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantserve.checkpoint import open_checkpoint
from quantserve.errors import CheckpointError, UsageError
from quantserve.finding import Severity
from quantserve.model.layers import linears
from quantserve_quantize.quantizer import Quantizer
from quantserve_quantize.source import Weights


class Dequantized(Weights):
    """The same as `Weights` for a checkpoint that a plugin's quantizer can read.

    Args:
        folder: the checkpoint.
        quantizer: of its method.
    """

    def __init__(self, folder: Path, quantizer: type[Quantizer]) -> None:
        self.folder = folder
        self.checkpoint = open_checkpoint(str(folder))
        if errors := [problem for problem in self.checkpoint.problems if problem.severity is Severity.ERROR]:
            raise CheckpointError(f"{folder}: {errors[0].message}\n  fix: {errors[0].fix}")
        self.quantizer = quantizer
        self.config: dict[str, Any] = dict(self.checkpoint.quantization_config or {})
        stored = {name: folder / tensor.file for name, tensor in self.checkpoint.tensors.items()}
        parts: dict[str, dict[str, str]] = defaultdict(dict)
        modules = {one.name for linear in linears(self.checkpoint) for one in linear.each()}
        for name in stored:
            module = next((m for m in _prefixes(name) if m in modules), None)
            if module:
                parts[module][name.removeprefix(f"{module}.")] = name
        self.parts = {module: found for module, found in parts.items() if found.keys() - {"weight", "bias"}}
        self.stored = stored
        self.files = stored | {
            f"{module}.weight": stored[next(iter(found.values()))] for module, found in self.parts.items()
        }

    def finite(self, name: str) -> Tensor:
        """A weight in float32, dequantized where it is quantized."""
        module = name.removesuffix(".weight")
        if module not in self.parts or not name.endswith(".weight"):
            return super().finite(name)
        tensors = {suffix: self.get(one) for suffix, one in self.parts[module].items() if suffix != "bias"}
        try:
            return self.quantizer.dequantize(tensors, self.config).to(torch.float32)
        except NotImplementedError:
            raise UsageError(
                f"{self.folder}: weights of this method can be judged through the engine only\n"
                "  fix: add --engine, or --url of a server that serves it"
            ) from None


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
