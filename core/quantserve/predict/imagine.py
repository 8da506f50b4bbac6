"""A checkpoint nobody has made yet: what a model would hold in a method's format."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quantserve.checkpoint import Tensor
from quantserve.model.architecture import read_sizes
from quantserve.model.layers import linears, other_tensors
from quantserve.predict.shape import TOWER, linear_weights

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint
    from quantserve.model.architecture import Architecture

_KEYS = ("quantization_config", "compression_config")


def imagined(checkpoint: Checkpoint, bits_per_weight: float) -> Checkpoint:
    """The model of a config.json with its decoder linears at so many bits a weight and the rest in 16 bits.

    Tensors have the right sizes and no more: enough for an estimate of memory, not for a plugin's checks. There are
    none where config.json does not give the sizes of a decoder.
    """
    plain = bits_per_weight >= 16
    tensors: dict[str, Tensor] = {}
    sizes = read_sizes(checkpoint)
    if sizes is not None and not sizes.known:
        tensors = _of_unknown_family(checkpoint, sizes, bits_per_weight)
    for linear in linears(checkpoint) if sizes is None or sizes.known else ():
        k = linear.k if plain else max(1, round(linear.k * bits_per_weight / 8))
        for module in linear.names:
            name = f"{module}.weight" if plain else f"{module}.qweight"
            tensors[name] = Tensor(name, "BF16" if plain else "U8", (linear.n, k))
    for name, shape in other_tensors(checkpoint).items():
        tensors[name] = Tensor(name, "BF16", shape)
    dtype = checkpoint.torch_dtype
    config = {**_without_method(checkpoint.config)}
    if dtype not in ("float16", "bfloat16"):
        config["torch_dtype"] = "bfloat16"
    return replace(checkpoint, tensors=tensors, config=config, quant_files={}, files={"config.json": 1}, problems=())


def _of_unknown_family(checkpoint: Checkpoint, sizes: Architecture, bits: float) -> dict[str, Tensor]:
    """One tensor a layer that stands for all its linears, embeddings, and what the files hold beside the decoder."""
    made = {"model.embed_tokens.weight": Tensor("model.embed_tokens.weight", "BF16", (sizes.vocab, sizes.hidden))}
    if sizes.generates and not sizes.tied:
        made["lm_head.weight"] = Tensor("lm_head.weight", "BF16", (sizes.vocab, sizes.hidden))
    rows = max(1, linear_weights(checkpoint, sizes) // sizes.layers // sizes.hidden)
    for index in range(sizes.layers):
        name = f"model.layers.{index}.linears.{'weight' if bits >= 16 else 'qweight'}"
        made[name] = (
            Tensor(name, "BF16", (rows, sizes.hidden))
            if bits >= 16
            else Tensor(name, "U8", (rows, max(1, round(sizes.hidden * bits / 8))))
        )
    towers = {name: tensor for name, tensor in checkpoint.tensors.items() if TOWER.search(name)}
    return {**made, **towers}


def _without_method(config: Any) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in _KEYS}
    if isinstance(text := kept.get("text_config"), dict):
        kept["text_config"] = {key: value for key, value in text.items() if key not in _KEYS}
    return kept
