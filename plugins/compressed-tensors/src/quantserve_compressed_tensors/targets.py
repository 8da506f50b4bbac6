"""Which group of the config a layer belongs to, found as vLLM 0.32 finds it (``find_matched_target``).

vLLM asks for the layers that it builds, so q, k and v belong to what the name ``qkv_proj`` matches, else to what all of
them match, else to what the layer's class matches.
"""

from __future__ import annotations

from collections.abc import Sequence

from quantserve.api import Checkpoint, Linear, SkipList, linears, once
from quantserve_compressed_tensors.config import Group, Written, read_config
from quantserve_compressed_tensors.schemes import kind_of

# What vLLM fuses, and in which order it asks for the parts.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
EXPERTS = "RoutedExperts"


class Targets:
    """The targets of a config, in order.

    Attributes:
        unclear: patterns that are not compared, because they may take long or are no patterns.
    """

    def __init__(self, targets: Sequence[str]) -> None:
        self._targets = list(targets)
        self._place = {target: place for place, target in enumerate(targets)}
        self._patterns = [(target, SkipList([target], "regex")) for target in targets if target.startswith("re:")]
        self.unclear = [target for target, pattern in self._patterns if pattern.skips("") is None]

    def match(self, layer: str, parts: Sequence[str], kind: str) -> str | None:
        """The target of a layer, None where none matches.

        Args:
            layer: path of the layer vLLM builds.
            parts: paths of what it is fused from; empty when it is not fused.
            kind: the name of its class in vLLM.
        """
        if (found := self._first(layer)) is not None:
            return found
        if parts:
            each = [self._first(part) for part in parts]
            if None not in each:
                return each[0]
        for target in self._targets:
            if target.lower() in kind.lower() or (target.startswith("re:") and self._matches(target, kind)):
                return target
        return "Linear" if kind == EXPERTS and "Linear" in self._place else None

    def _first(self, name: str) -> str | None:
        places = [self._place[target] for target, pattern in self._patterns if pattern.skips(name)]
        if name in self._place and not name.startswith("re:"):
            places.append(self._place[name])
        return self._targets[min(places)] if places else None

    def _matches(self, target: str, name: str) -> bool:
        return any(pattern.skips(name) for other, pattern in self._patterns if other == target)


class Groups:
    """The groups of a checkpoint's config, by linear."""

    def __init__(self, written: Written) -> None:
        self._by_target = written.by_target()
        self.targets = Targets(list(self._by_target))

    def of(self, linear: Linear) -> Group | None:
        """The group of a linear; None where no target matches the layer that vLLM builds for it."""
        if linear.fused == "experts":
            target = self.targets.match(_first_expert(linear), (), EXPERTS)
        else:
            parent = linear.group.rpartition(".")[0]
            parts = [f"{parent}.{part}" for part in FUSED.get(linear.fused, ())]
            target = self.targets.match(linear.group, parts, _class_of(linear))
        return None if target is None else self._by_target[target]


@once
def groups_of(checkpoint: Checkpoint) -> Groups | None:
    """The groups of a checkpoint; None where vLLM stops at one of them, or where targets cannot be compared."""
    written = read_config(checkpoint)
    if written is None or not written.groups or written.problems or None in map(kind_of, written.groups):
        return None
    groups = Groups(written)
    return None if groups.targets.unclear else groups


@once
def unmatched(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The layers that vLLM builds for linears of the model and that no target matches: it leaves them unquantized."""
    groups = groups_of(checkpoint)
    if groups is None:
        return ()
    return tuple(dict.fromkeys(linear.group for linear in linears(checkpoint) if groups.of(linear) is None))


def _first_expert(linear: Linear) -> str:
    """vLLM asks for the linears of expert 0; where tensors stack the experts, for gate_proj, up_proj and down_proj."""
    leaf = linear.name.rpartition(".")[2]
    return f"{linear.group}.0.{'gate_proj' if linear.stacked and leaf == 'gate_up_proj' else leaf}"


def _class_of(linear: Linear) -> str:
    if linear.name.rpartition(".")[2] == "lm_head":
        return "ParallelLMHead"
    if linear.fused:
        return "QKVParallelLinear" if linear.fused == "qkv_proj" else "MergedColumnParallelLinear"
    return "RowParallelLinear" if linear.parallel == "row" else "ColumnParallelLinear"
