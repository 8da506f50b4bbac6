"""A checkpoint nobody has made yet: what a model would hold in a method's format."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quantserve.checkpoint import Tensor
from quantserve.layers import linears, other_tensors

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint

_KEYS = ("quantization_config", "compression_config")


def imagined(checkpoint: Checkpoint, bits_per_weight: float) -> Checkpoint:
    """The model of a config.json with its decoder linears at so many bits a weight and the rest in 16 bits.

    Tensors have the right sizes and no more: enough for an estimate of memory, not for a plugin's checks. Without a
    known family there are none.
    """
    plain = bits_per_weight >= 16
    tensors: dict[str, Tensor] = {}
    for linear in linears(checkpoint):
        name = f"{linear.name}.weight" if plain else f"{linear.name}.qweight"
        k = linear.k if plain else max(1, round(linear.k * bits_per_weight / 8))
        tensors[name] = Tensor(name, "BF16" if plain else "U8", (linear.n, k))
    for name, shape in other_tensors(checkpoint).items():
        tensors[name] = Tensor(name, "BF16", shape)
    dtype = checkpoint.torch_dtype
    config = {**_without_method(checkpoint.config)}
    if dtype not in ("float16", "bfloat16"):
        config["torch_dtype"] = "bfloat16"
    return replace(checkpoint, tensors=tensors, config=config, quant_files={}, files={"config.json": 1}, problems=())


def _without_method(config: Any) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in _KEYS}
    if isinstance(text := kept.get("text_config"), dict):
        kept["text_config"] = {key: value for key, value in text.items() if key not in _KEYS}
    return kept
