"""The quantization config of compressed-tensors: which modules have which weights and activations.

The keys, their defaults and what is refused are those of ``QuantizationArgs`` of compressed-tensors 0.17; which kind of
layer vLLM 0.32 makes of them is that of its ``CompressedTensorsConfig``. Tests compare both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantserve.api import Checkpoint, once

NAME = "compressed-tensors"
PACKED, INTEGERS, FLOATS, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_ORDERS = {"group": "group", "dynamic": "group", "true": "group", "weight": "weight", "static": "weight"}
WITH_ACTIVATIONS = (NAIVE, INTEGERS, FLOATS, "nvfp4-pack-quantized")
"""Formats of which vLLM expects quantized activations, or floating-point weights."""


@dataclass(frozen=True)
class Args:
    """How values are quantized: ``weights`` or ``input_activations`` of a group of the config.

    Attributes:
        bits: width of a code.
        type: ``int`` or ``float``.
        symmetric: whether there are no zero points.
        strategy: what shares a scale.
        group_size: inputs that share one, None for other strategies than groups.
        block: rows and columns of a block, for the strategy ``block``.
        dynamic: whether scales of activations are computed while serving.
        order: the order of activations with which GPTQ quantized: ``group``, ``weight`` or "".
        scales: dtype of the scales, where the config gives it.
    """

    bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str = "tensor"
    group_size: int | None = None
    block: tuple[int, int] | None = None
    dynamic: bool = False
    order: str = ""
    scales: str = ""

    def is_(self, type_: str, bits: int, *strategies: str) -> bool:
        """Whether the values are of this type, width and one of these strategies."""
        return (self.type, self.bits) == (type_, bits) and self.strategy in strategies


@dataclass(frozen=True)
class Group:
    """One entry of ``config_groups``.

    Attributes:
        name: its key.
        targets: class names, module names and patterns of the modules.
        weights, inputs: how they are quantized; inputs are None where activations keep 16 bits.
        outputs: how the results are quantized; None where they are not.
        format: how the weights are stored.
    """

    name: str
    targets: tuple[str, ...]
    weights: Args
    inputs: Args | None
    outputs: Args | None
    format: str


@dataclass(frozen=True)
class Written:
    """What the quantization config of a checkpoint says.

    Attributes:
        values: the mapping as written.
        groups: its groups, without those of attention alone, which vLLM takes for a part of the KV cache's scheme.
        problems: entries that vLLM stops at, each with the reason.
    """

    values: Mapping[str, Any]
    groups: tuple[Group, ...]
    problems: tuple[str, ...]

    def by_target(self) -> dict[str, Group]:
        """The group of each target, in order; of a target that several groups have, vLLM takes the last group."""
        return {target: group for group in self.groups for target in group.targets}


@once
def read_config(checkpoint: Checkpoint) -> Written | None:
    """The config of a checkpoint that declares this method; None where it declares another, or none."""
    values = checkpoint.quantization_config
    if values is None or str(values.get("quant_method", "")).strip().lower() != NAME:
        return None
    entries = values.get("config_groups") or {}
    if not isinstance(entries, Mapping):
        return Written(values, (), (f"config_groups is {type(entries).__name__}, not an object",))
    groups, problems = [], []
    for name, entry in entries.items():
        try:
            if (group := _group(str(name), entry, values.get("format"))) is not None:
                groups.append(group)
        except ValueError as error:
            problems.append(f"config_groups.{str(name)[:40]}: {error}")
    return Written(values, tuple(groups), tuple(problems))


def _group(name: str, entry: object, form: object) -> Group | None:
    if not isinstance(entry, Mapping):
        raise ValueError("is no object")
    targets = entry.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError("targets is no list of texts")
    if len(targets) == 1 and targets[0].endswith("Attention"):
        return None
    form = entry.get("format") or form
    if not isinstance(entry.get("weights"), Mapping):
        raise ValueError("weights is no object; vLLM needs one in each group")
    weights = read_args(entry["weights"])
    if weights.order == "group":
        raise ValueError(
            "actorder is 'group' (act-order with weight_g_idx), which vLLM 0.32 has removed; quantize with actorder "
            "'static', or none"
        )
    inputs, outputs = (
        read_args(entry[key]) if entry.get(key) else None for key in ("input_activations", "output_activations")
    )
    if form in WITH_ACTIVATIONS and inputs is None and weights.type != "float":
        raise ValueError(f"format {form} with integer weights has no input_activations; vLLM stops at that")
    return Group(name, tuple(targets), weights, inputs, outputs, str(form))


def read_args(values: object) -> Args:
    """Arguments of weights or activations.

    Raises:
        ValueError: compressed-tensors refuses them, with the reason.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{str(values)[:40]} is no object")
    strategy, group, block = values.get("strategy"), values.get("group_size"), values.get("block_structure")
    bits, order, dynamic = values.get("num_bits", 8), values.get("actorder"), values.get("dynamic") or False
    kind = str(values.get("type", "int")).lower()
    if type(bits) is not int or bits < 1:
        raise ValueError(f"num_bits is {str(bits)[:40]!r}, not a positive number")
    if kind not in ("int", "float") or (kind == "float" and bits not in (4, 8)):
        raise ValueError(f"no such values: {bits} bits of type {kind[:40]!r}")
    if group is not None and (type(group) is not int or group < -1):
        raise ValueError(f"group_size is {str(group)[:40]!r}, not a positive number or -1")
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    strategy = str(strategy).lower()
    if strategy not in _STRATEGIES:
        raise ValueError(f"strategy is {strategy[:40]!r}; it has {', '.join(_STRATEGIES)}")
    if (strategy in ("group", "tensor_group")) != bool(group and group > 0):
        raise ValueError(f"group_size {group} does not fit strategy {strategy!r}")
    if isinstance(block, str):
        block = [int(size) if size.isdecimal() else size for size in block.split("x")]
    if block is not None and not (isinstance(block, list) and [type(size) for size in block] == [int, int]):
        raise ValueError(f"block_structure is {str(block)[:40]}, not [rows, columns]")
    if (strategy == "block") != (block is not None):
        raise ValueError(f"block_structure {block} does not fit strategy {strategy!r}")
    if (strategy == "token" and not dynamic) or (dynamic and strategy in ("channel", "block", "attn_head")):
        raise ValueError(f"strategy {strategy!r} does not fit dynamic {dynamic!r}")
    if str(dynamic).lower() == "local" and strategy != "tensor_group":
        raise ValueError(f"dynamic 'local' does not fit strategy {strategy!r}")
    order = _ORDERS.get(str(order).lower(), "")
    if order == "group" and strategy not in ("group", "tensor_group"):
        raise ValueError(f"actorder 'group' does not fit strategy {strategy!r}")
    return Args(
        bits, kind, values.get("symmetric", True) is not False, strategy, group if group != -1 else None,
        (block[0], block[1]) if block else None, bool(dynamic), order,
        str(values.get("scale_dtype") or ""),
    )  # fmt: skip
