"""One linear of a decoder, or the experts of a layer that are alike, and what a tensor-parallel rank has of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

# A tensor that stacks the experts of a layer, and what follows the module's name: ``experts.gate_up_proj_blocks``.
_STACK = re.compile(
    r"^(.+\.(?:experts\.(?:gate_up_proj|gate_proj|up_proj|down_proj|w13|w[123])|block_sparse_moe\.(?:input|output)_linear))"
    r"(?:[._](.+))?$"
)


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of a decoder block; of a mixture, the experts of a layer that are alike.

    Attributes:
        name: module path, ``model.layers.0.self_attn.q_proj``; tensors are ``<name>.<suffix>``. Of listed experts the
            path of the first, ``model.layers.0.mlp.experts.0.up_proj``.
        n: out_features, of one expert.
        k: in_features, of one expert.
        parallel: ``column`` when tensor parallelism splits N, ``row`` when it splits K.
        fused: the module vLLM fuses it into (``qkv_proj``, ``gate_up_proj``, ``experts``), or "".
        max_ranks: most ranks N can be split over (kv heads are replicated beyond); 0 is no limit.
        experts: how many experts it stands for; 0 for a linear that is no expert.
        listed: paths of the experts, where each has tensors of its own; empty where one tensor stacks them all.
    """

    name: str
    n: int
    k: int
    parallel: Literal["column", "row"]
    fused: str = ""
    max_ranks: int = 0
    experts: int = 0
    listed: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The modules whose tensors it stands for: every listed expert, or its own name."""
        return self.listed or (self.name,)

    @property
    def stacked(self) -> bool:
        """Whether each of its tensors holds all experts."""
        return self.experts > 0 and not self.listed

    @property
    def weights(self) -> int:
        """Weights of all its experts."""
        return self.n * self.k * max(1, self.experts)

    @property
    def group(self) -> str:
        """Path of the module vLLM builds for it: its fused module, or its own."""
        if not self.fused:
            return self.name
        if self.fused == "experts" and ".experts." in self.name:
            return self.name.partition(".experts.")[0] + ".experts"
        return f"{self.name.rpartition('.')[0]}.{self.fused}"

    def only(self, names: Sequence[str]) -> Linear:
        """The same for some of its listed experts."""
        if not self.listed or len(names) == len(self.listed):
            return self
        return replace(self, name=names[0], experts=len(names), listed=tuple(names))

    def each(self) -> Iterator[Linear]:
        """One entry for every module, of one linear each."""
        if self.listed:
            return (replace(self, name=name, experts=1, listed=(name,)) for name in self.listed)
        return iter((self,))


def shard_n(linear: Linear, ranks: int) -> int:
    """N on one of ``ranks`` tensor-parallel ranks, rounded down where it does not divide."""
    if linear.parallel == "row":
        return linear.n
    return linear.n // min(ranks, linear.max_ranks or ranks)


def shard_k(linear: Linear, ranks: int) -> int:
    """K on one of ``ranks`` tensor-parallel ranks, rounded down where it does not divide."""
    return linear.k // ranks if linear.parallel == "row" else linear.k


def stack_of(name: str) -> tuple[str, str] | None:
    """Module and suffix of a tensor that stacks experts (``weight`` where its name ends with the module's), or None."""
    match = _STACK.match(name) if "expert" in name or "moe" in name else None
    return (match[1], match[2] or "weight") if match else None


def expert_of(module: str) -> tuple[str, int, str] | None:
    """A listed expert's linear as ``("model.layers.0.mlp.experts", 7, "up_proj")``; None for other modules."""
    before, found, rest = module.rpartition(".experts.")
    number, _, leaf = rest.partition(".")
    return (
        (before + ".experts", int(number), leaf) if found and leaf and len(number) <= 6 and number.isdecimal() else None
    )


def grouped(every: Iterable[Linear]) -> Iterator[Linear]:
    """Linears with those of the experts that are alike as one entry, at the place of the first."""
    found: dict[object, list[tuple[int, Linear]]] = {}
    for linear in every:
        expert = expert_of(linear.name) if linear.fused == "experts" else None
        if expert is None:
            found[linear.name] = [(0, linear)]
        else:
            key = (expert[0], expert[2], linear.n, linear.k)
            found.setdefault(key, []).append((expert[1], linear))
    for entries in found.values():
        first = min(entries, key=lambda one: one[0])[1]
        if first.fused == "experts" and not first.stacked:
            names = tuple(linear.name for _, linear in sorted(entries, key=lambda one: one[0]))
            yield replace(first, experts=len(names), listed=names)
        else:
            yield first
