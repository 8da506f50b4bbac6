"""FP8 checkpoints as data: settings of their config, and the tensors of a linear. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from quantserve.api import K, N, Part, Scheme

WEIGHT = "F8_E4M3"
FLOATS = ("F32", "BF16", "F16")


def block_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where a scale belongs to a tensor or an output channel.

    Raises:
        ValueError: it is no pair of positive integers.
    """
    value = config.get("weight_block_size")
    if value is None:
        return None
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    if not pair or not all(type(one) is int and one > 0 for one in value):
        raise ValueError(f"weight_block_size is {value!r}, expected two positive integers, such as [128, 128]")
    return value[0], value[1]


def skip_key(config: Mapping[str, Any]) -> str:
    """The key of the list of unquantized modules: vLLM reads the second one where the first is empty."""
    return "ignored_layers" if config.get("ignored_layers") else "modules_to_not_convert"


def skipped(config: Mapping[str, Any]) -> Any:
    """The list of unquantized modules as it stands in the config."""
    return config.get(skip_key(config)) or ()


@cache
def scheme(block: tuple[int, int] | None) -> Scheme:
    """E4M3 values [n, k] with scales by which they are multiplied.

    Args:
        block: rows and columns that share a scale (``weight_scale_inv``, DeepSeek's name); None for ``weight_scale``,
            a scale of the tensor or of each output channel.
    """
    weight = Part((N(), K()), (WEIGHT,))
    if block is not None:
        scales = Part((N(block[0], partial=True), K(block[1], partial=True)), FLOATS)
        return Scheme(
            {"weight": weight, "weight_scale_inv": scales},
            bits=8,
            group_size=block[1],
            scales="block",
            activation_bits=8,
        )
    channel, tensor, one = (Part(shape, FLOATS) for shape in ((N(), 1), (), (1,)))
    inputs = tuple(Part(shape, FLOATS, optional=True) for shape in ((), (1,)))
    return Scheme(
        {"weight": weight, "weight_scale": (channel, tensor, one), "input_scale": inputs},
        bits=8,
        scales="channel",
        activation_bits=8,
    )
