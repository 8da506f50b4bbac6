"""The quantization config of compressed-tensors: groups of modules, and how each is quantized. Both sides read it here.

Keys and defaults are those of ``QuantizationArgs`` of compressed-tensors 0.17; tests compare them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quantserve.api import Checkpoint, SkipList, once

NAME, ENGINE = "compressed-tensors", "compressed_tensors_codebook"
"""What files declare, and the argument that leads to this plugin's engine side."""
PACKED, INTEGERS, FLOATS, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
GROUPED = ("group", "tensor_group")
STRATEGIES = (*GROUPED, "tensor", "channel", "block", "token", "attn_head")


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
        act_order: whether ``weight_g_idx`` scatters groups over all inputs.
        exponents: whether scales are stored as E8M0, powers of two.
    """

    bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str = "tensor"
    group_size: int | None = None
    block: tuple[int, int] | None = None
    dynamic: bool = False
    act_order: bool = False
    exponents: bool = False

    def is_(self, type_: str, bits: int, *strategies: str) -> bool:
        """Whether the values are of this type, width and one of these strategies."""
        return (self.type, self.bits) == (type_, bits) and self.strategy in strategies

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in vars(self).items() if value not in (None, False))


@dataclass(frozen=True)
class Group:
    """One entry of ``config_groups``.

    Attributes:
        name: its key.
        targets: class names, module names and ``re:`` patterns of the modules.
        weights, inputs, outputs: how they are quantized; None where they keep 16 bits.
        format: how the weights are stored.
    """

    name: str
    targets: tuple[str, ...]
    weights: Args
    inputs: Args | None
    outputs: Args | None
    format: str


@dataclass(frozen=True)
class Config:
    """The quantization config.

    Attributes:
        values: the mapping as written.
        groups: its groups, without those of attention alone, which vLLM takes for a part of the KV cache's scheme.
        problems: entries that vLLM stops at, each with the reason.
    """

    values: Mapping[str, Any]
    groups: tuple[Group, ...] = ()
    problems: tuple[str, ...] = ()

    @cached_property
    def targets(self) -> dict[str, Group]:
        """The group of each target, in order; of a target that several groups have, vLLM takes the last group."""
        return {target: group for group in self.groups for target in group.targets}

    @cached_property
    def _matching(self) -> list[tuple[str, Callable[[str], object], Group]]:
        return [(target, _matching(target), group) for target, group in self.targets.items()]

    def of(self, module: str, layer: str = "") -> Group | None:
        """The group of a module, as the files are written and vLLM reads them; None where no target matches.

        The first target that is the name, or whose pattern matches from its start, counts, before those that are the
        class: ``Linear`` of all modules but lm_head, whose class vLLM calls ``ParallelLMHead``.

        Args:
            module: its path: ``model.layers.0.self_attn.q_proj``.
            layer: the path of the layer that vLLM fuses it into (``...qkv_proj``), which is compared first.
        """
        for name in (layer, module) if layer else (module,):
            for _, matches, group in self._matching:
                if matches(name):
                    return group
        kind = "ParallelLMHead" if module.rpartition(".")[2] == "lm_head" else "Linear"
        for target, matches, group in self._matching:
            if target.lower() in kind.lower() or (target.startswith("re:") and matches(kind)):
                return group
        return None

    def ignores(self, module: str, layer: str = "") -> bool:
        """Whether the list ``ignore`` names a module, or the layer it is fused into."""
        return any(matches(name) for matches in self._ignored for name in (module, layer))

    @cached_property
    def _ignored(self) -> list[Callable[[str], object]]:
        return [_matching(entry) for entry in self.values.get("ignore") or ()]

    @cached_property
    def slow(self) -> list[str]:
        """Patterns that may take long; no names are compared with them before an engine starts."""
        return [target for target in self.targets if SkipList([target], "regex").skips("") is None]


def _matching(target: str) -> Callable[[str], object]:
    return re.compile(target[3:]).match if target.startswith("re:") else target.__eq__


@once
def config_of(checkpoint: Checkpoint) -> Config | None:
    """The config of a checkpoint that declares this method; None where it declares another, or none."""
    values = checkpoint.quantization_config
    declared = values is not None and str(values.get("quant_method", "")).strip().lower() == NAME
    return read_config(values) if values is not None and declared else None


def read_config(values: Mapping[str, Any]) -> Config:
    """Read a quantization config; what is wrong with it is in `problems`."""
    entries = values.get("config_groups") or {}
    if not isinstance(entries, Mapping):
        return Config(values, problems=(f"config_groups is {type(entries).__name__}, not an object",))
    groups, problems = [], []
    for name, entry in entries.items():
        try:
            if (group := _group(str(name), entry, values.get("format"))) is not None:
                groups.append(group)
        except (ValueError, re.error) as error:
            problems.append(f"config_groups.{str(name)[:40]}: {error}")
    return Config(values, tuple(groups), tuple(problems))


def _group(name: str, entry: object, form: object) -> Group | None:
    if not isinstance(entry, Mapping):
        raise ValueError("is no object")
    targets = entry.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError("targets is no list of texts")
    for target in targets:
        _matching(target)
    if len(targets) == 1 and targets[0].endswith("Attention"):
        return None
    if not isinstance(entry.get("weights"), Mapping):
        raise ValueError("weights is no object; vLLM needs one in each group")
    inputs, outputs = (
        read_args(entry[key]) if entry.get(key) else None for key in ("input_activations", "output_activations")
    )
    return Group(name, tuple(targets), read_args(entry["weights"]), inputs, outputs, str(entry.get("format") or form))


def read_args(values: object) -> Args:
    """Arguments of weights or activations.

    Raises:
        ValueError: compressed-tensors refuses them, with the reason.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{str(values)[:40]} is no object")
    bits, kind, group = values.get("num_bits", 8), str(values.get("type", "int")).lower(), values.get("group_size")
    if type(bits) is not int or bits < 1 or kind not in ("int", "float") or (kind == "float" and bits not in (4, 8)):
        raise ValueError(f"no such values: {str(bits)[:40]} bits of type {kind[:40]!r}")
    symmetric, dynamic = values.get("symmetric", True), values.get("dynamic") or False
    if type(symmetric) is not bool or (type(dynamic) is not bool and dynamic != "local"):
        raise ValueError(f"symmetric is {str(symmetric)[:40]} and dynamic {str(dynamic)[:40]}, not true or false")
    usual = "tensor" if group is None else "channel" if group == -1 else "group"
    strategy, block = str(values.get("strategy") or usual).lower(), values.get("block_structure")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy[:40]!r}; it has {', '.join(STRATEGIES)}")
    if group not in (None, -1) if strategy not in GROUPED else type(group) is not int or group < 1:
        raise ValueError(f"{_named('group_size', group)} does not fit strategy {strategy!r}")
    if isinstance(block, str):
        block = [int(size) if size.isdecimal() else size for size in block.split("x")]
    pair = isinstance(block, list) and [type(size) for size in block] == [int, int]
    if not pair if strategy == "block" else block is not None:
        raise ValueError(f"{_named('block_structure', block)} does not fit strategy {strategy!r}")
    return Args(
        bits, kind, symmetric, strategy, group if group != -1 else None,
        (block[0], block[1]) if block else None, bool(dynamic),
        str(values.get("actorder")).lower() in ("group", "dynamic", "true"),
        str(values.get("scale_dtype")).endswith("uint8"),
    )  # fmt: skip


def _named(key: str, value: object) -> str:
    return f"a missing {key}" if value is None else f"{key} {str(value)[:40]}"
