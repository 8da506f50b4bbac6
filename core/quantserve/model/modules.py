"""The modules of the files: which tensors belong to one, and which of them config.json does not describe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from quantserve.model.architecture import read_sizes
from quantserve.model.layers import PACKED, block_of, fused_into, linears, other_tensors
from quantserve.model.linear import Linear, expert_of, grouped, stack_of
from quantserve.once import once

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint, Tensor

# vLLM reads these beside a quantized attention; they scale the KV cache, not the weights.
CACHE_SCALES = (
    "k_scale", "v_scale", "kv_scale", "q_scale", "output_scale", "q_zero_point", "k_zero_point", "v_zero_point",
)  # fmt: skip
BESIDE = frozenset({"bias", *CACHE_SCALES})
"""Tensors of a linear that are none of its method's."""

# What vLLM splits along K in every family, and what along N, with the layer it fuses that into.
_ROW = ("o_proj", "down_proj", "out_proj", "w2", "output_linear")
_COLUMN = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj", "w1": "", "w3": "", "q_b_proj": "", "kv_b_proj": "",
}  # fmt: skip
_MAX_DOTS = 32


@once
def modules(checkpoint: Checkpoint) -> Mapping[str, Mapping[str, Tensor]]:
    """The tensors of the files by module: ``{"model.layers.0.mlp.up_proj": {"qweight": Tensor, ...}}``.

    A suffix may have dots: ``up_proj.weight.absmax`` belongs to ``up_proj``, as its ``weight.absmax``. A tensor that
    stacks experts may have none (``experts.down_proj`` is the ``weight`` of a module of that name), or one after an
    underscore: ``experts.down_proj_blocks`` is its ``blocks``.
    """
    found: dict[str, dict[str, Tensor]] = {}
    owner = _owners(checkpoint)
    for name, tensor in checkpoint.tensors.items():
        module, suffix = owner.split(name)
        found.setdefault(module, {})[suffix] = tensor
    return MappingProxyType({module: MappingProxyType(tensors) for module, tensors in found.items()})


def module_of(name: str, checkpoint: Checkpoint) -> str:
    """The module a tensor belongs to.

    That is the longest path of a linear the name begins with. Elsewhere it is the name up to its last
    dot, or up to that of the shortest tensor it extends (``weight``, ``weight.absmax``).
    """
    return _owners(checkpoint).split(name)[0]


class _Owners:
    """The modules of tensors, remembered by what comes before the last dot of their names."""

    def __init__(self, paths: frozenset[str], tensors: Mapping[str, Tensor]) -> None:
        self._paths = paths
        self._tensors = tensors
        self._known: dict[str, str | None] = {"": None}

    def split(self, name: str) -> tuple[str, str]:
        """Module and suffix of a tensor."""
        parent, _, suffix = name.rpartition(".")
        if parent.endswith(".experts") and (stack := stack_of(name)):
            return stack
        owner = self._known[parent] if parent in self._known else self._owner(parent)
        if owner is None:
            return parent, suffix
        return owner, name[len(owner) + 1 :] if owner else name

    def _owner(self, path: str) -> str | None:
        """The linear at or above a path, else what the shortest tensor at or above it belongs to; None for neither."""
        if path.count(".") > _MAX_DOTS:
            return None
        if path not in self._known:
            above = path.rpartition(".")[0]
            stacked = above.endswith((".experts", ".block_sparse_moe")) and stack_of(path) == (path, "weight")
            linear = path in self._paths or stacked
            found = path if linear else self._owner(above)
            self._known[path] = above if found is None and path in self._tensors else found
        return self._known[path]


@once
def _owners(checkpoint: Checkpoint) -> _Owners:
    paths = frozenset(name for linear in linears(checkpoint) for name in linear.names)
    return _Owners(paths, checkpoint.tensors)


@once
def undescribed(checkpoint: Checkpoint) -> tuple[Linear, ...]:
    """Modules with more than a weight that config.json does not describe: lm_head, linears of unknown families.

    N and K are 0. Experts of a layer are one entry. A name that does not tell how vLLM splits the module counts as
    whole on every rank.
    """
    return tuple(grouped(_undescribed(checkpoint)))


def _undescribed(checkpoint: Checkpoint) -> Iterator[Linear]:
    known = {name for linear in linears(checkpoint) for name in linear.names}
    kv_heads = checkpoint.text_config.get("num_key_value_heads")
    for name, tensors in modules(checkpoint).items():
        if name in known or all(suffix == "weight" or suffix in BESIDE for suffix in tensors):
            continue
        leaf = name.rpartition(".")[2]
        if block_of(name + ".") is None:
            yield Linear(name, 0, 0, "column", "", 1)
        elif stack_of(name):
            yield Linear(name, 0, 0, "row" if leaf in _ROW else "column", "experts", 0, _experts(checkpoint, tensors))
        elif leaf in _ROW:
            yield Linear(name, 0, 0, "row", "experts" if expert_of(name) else "")
        elif leaf in _COLUMN:
            replicated = leaf in ("k_proj", "v_proj")
            most = (kv_heads if type(kv_heads) is int and kv_heads > 0 else 1) if replicated else 0
            yield Linear(name, 0, 0, "column", "experts" if expert_of(name) else _COLUMN[leaf], most)
        else:
            yield Linear(name, 0, 0, "column", "", 1)


def _experts(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> int:
    sizes = read_sizes(checkpoint)
    if sizes is not None and sizes.experts:
        return sizes.experts
    return max((tensor.shape[0] for tensor in tensors.values() if tensor.shape), default=0)


@once
def engine_layers(checkpoint: Checkpoint) -> Mapping[str, tuple[str, ...]]:
    """The layers vLLM builds for the linears: path (`Linear.group`) -> paths of the modules fused into it.

    A layer of its own has none. For families known only from the files, linears that they hold quantized are included.
    """
    every = [(linear.group, linear) for linear in linears(checkpoint)]
    if not other_tensors(checkpoint):
        present = modules(checkpoint)
        for linear in undescribed(checkpoint):
            if block_of(linear.name + ".") is not None and (
                linear.stacked or any(part in present[linear.name] for part in PACKED)
            ):
                fused = fused_into(linear.name, checkpoint)
                every.append((Linear(linear.name, 0, 0, "column", fused).group, linear))
    found: dict[str, list[str]] = {}
    for layer, linear in every:
        found.setdefault(layer, []).extend(linear.names if layer != linear.name else ())
    return MappingProxyType({layer: tuple(parts) for layer, parts in found.items()})
