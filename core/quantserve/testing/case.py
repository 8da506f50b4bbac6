"""What an author says about a plugin, so that the kit can test it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

CAPABILITIES: Final = ("tensor-parallel", "experts", "cpu", "cuda", "rocm", "converter", "quantizer", "reader")
"""What a plugin may be capable of; a check that needs one of them applies to those plugins only."""


@dataclass(frozen=True)
class Case:
    """One plugin, and one good checkpoint of its format.

    Attributes:
        name: of the entry point in the group ``quantserve.plugins``.
        checkpoint: a good checkpoint, as small as can be. A folder or a file of a container; a function that writes one
            into an empty folder; or a quantization_config, for which the kit writes a small Llama with the tensors of
            ``quantserve_scheme``, without values. None is ``{"quant_method": NAME}``, or for a plugin without a method
            no quantization_config.
        reference: from the folder of the checkpoint to the weights [n, k] of its quantized linears, by module, in
            float32: computed by another program than the plugin's `pack`. Only with it the checks on layers run. A
            module that is left out is not compared.
        tolerance: by how much the reference may differ, as a share of a linear's largest weight: 0 is bit for bit,
            2**-10 that of a program which computes in float16.
        capabilities: some of `CAPABILITIES`; None for those that the plugin's method and hooks tell, and
            ``tensor-parallel``.
        formats: formats of the kit's samples (`quantserve.testing.SAMPLES`) that the plugin claims by right, beside
            that of its own name.
        harmless: damages that change nothing, with the reason: ``{"config version removed": "nobody reads it"}``.
            Names are patterns of `fnmatch`. The kit fails one that is refused after all, and one that matches nothing.
        expected_failures: ids of checks that fail, with the reason. One that passes counts as a failure.
    """

    name: str
    checkpoint: Path | Callable[[Path], object] | Mapping[str, Any] | None = None
    reference: Callable[[Path], Mapping[str, Any]] | None = None
    tolerance: float = 0.0
    capabilities: Collection[str] | None = None
    formats: Collection[str] = ()
    harmless: Mapping[str, str] = field(default_factory=dict)
    expected_failures: Mapping[str, str] = field(default_factory=dict)
