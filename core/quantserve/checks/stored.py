"""Which linears of a checkpoint are stored in a method's scheme, and which as a plain ``weight``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from quantserve.model.layers import Linear, block_of, linears, modules
from quantserve.once import once
from quantserve.scheme import Scheme

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint, Tensor

Schemes = Callable[[Linear], Scheme | None]
"""The scheme of a linear; None where the method stores it as a plain ``weight``."""

FLOATS = ("F16", "BF16", "F32")

# vLLM reads these beside a quantized attention; they scale the KV cache, not the weights.
CACHE_SCALES = (
    "k_scale", "v_scale", "kv_scale", "q_scale", "output_scale", "q_zero_point", "k_zero_point", "v_zero_point",
)  # fmt: skip
BESIDE = frozenset({"bias", *CACHE_SCALES})
"""Tensors of a linear that are none of its method's."""

# What vLLM splits along K in every family, and what along N, with the layer it fuses that into.
_ROW = ("o_proj", "down_proj", "out_proj", "w2")
_COLUMN = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj", "w1": "", "w3": "",
}  # fmt: skip


class Stored(NamedTuple):
    """The linears of a checkpoint by how they are stored.

    Attributes:
        quantized: those in a scheme. Of linears that config.json does not describe, N and K are what the files hold.
        plain: those with a ``weight`` [n, k].
        unsized: linears in a scheme whose N and K neither config.json nor their tensors tell; both are 0.
    """

    quantized: list[tuple[Linear, Scheme]]
    plain: list[Linear]
    unsized: list[tuple[Linear, Scheme]]


def stored_linears(checkpoint: Checkpoint, schemes: Schemes) -> Stored:
    """Sort the linears of the model, and further quantized modules of the files, by how they are stored.

    A linear counts as plain when its ``weight`` is there and no other tensor of its scheme is. Where the codes are
    called ``weight`` as well (FP8, INT8, NF4), its dtype must be a floating-point one that the scheme does not name.
    Everything is empty where no linear has a scheme.
    """
    present = modules(checkpoint)
    found = Stored([], [], [])
    any_scheme = False
    for linear in linears(checkpoint):
        scheme = schemes(linear)
        any_scheme |= scheme is not None
        if scheme is None or is_plain(present.get(linear.name, {}), scheme):
            found.plain.append(linear)
        else:
            found.quantized.append((linear, scheme))
    for linear in undescribed(checkpoint):
        tensors = present[linear.name]
        scheme = schemes(linear)
        if scheme is None or next(iter(scheme.required()), None) not in tensors.keys() - {"weight"}:
            continue
        any_scheme = True
        size = scheme.solve(tensors)
        if size is None:
            found.unsized.append((linear, scheme))
        else:
            found.quantized.append((replace(linear, n=size[0], k=size[1]), scheme))
    return found if any_scheme else Stored([], [], [])


def is_plain(tensors: Mapping[str, Tensor], scheme: Scheme) -> bool:
    """Whether a linear with these tensors is stored as a plain ``weight``, and not in the scheme."""
    weight = tensors.get("weight")
    if weight is None or (scheme.parts.keys() & tensors.keys()) - {"weight"} - BESIDE:
        return False
    if "weight" not in scheme.parts:
        return True
    codes = scheme.alternatives("weight")
    return weight.dtype in FLOATS and not any(weight.dtype in part.dtypes for part in codes)


@once
def undescribed(checkpoint: Checkpoint) -> tuple[Linear, ...]:
    """Modules with more than a weight that config.json does not describe: lm_head, linears of unknown families.

    N and K are 0. A name that does not tell how vLLM splits the module counts as whole on every rank.
    """
    return tuple(_undescribed(checkpoint))


def _undescribed(checkpoint: Checkpoint) -> Iterator[Linear]:
    known = {linear.name for linear in linears(checkpoint)}
    kv_heads = checkpoint.text_config.get("num_key_value_heads")
    for name, tensors in modules(checkpoint).items():
        if name in known or not tensors.keys() - {"weight"} - BESIDE:
            continue
        leaf = name.rpartition(".")[2]
        experts = ".experts." in name
        if block_of(name + ".") is None or (leaf not in _ROW and leaf not in _COLUMN):
            yield Linear(name, 0, 0, "column", "", 1)
        elif leaf in _ROW:
            yield Linear(name, 0, 0, "row", "experts" if experts else "")
        else:
            replicated = leaf in ("k_proj", "v_proj")
            most = (kv_heads if type(kv_heads) is int and kv_heads > 0 else 1) if replicated else 0
            yield Linear(name, 0, 0, "column", "experts" if experts else _COLUMN[leaf], most)
