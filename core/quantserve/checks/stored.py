"""Which linears of a checkpoint are stored in a method's scheme, and which as a plain ``weight``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantserve.model.attention import size_of
from quantserve.model.layers import linears, oriented
from quantserve.model.linear import Linear
from quantserve.model.modules import BESIDE, modules, undescribed
from quantserve.scheme import Scheme

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint, Tensor

Schemes = Callable[[Linear], Scheme | None]
"""The scheme of a linear; None where the method stores it as a plain ``weight``."""

FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True, eq=False)
class Stored:
    """The linears of a checkpoint by how they are stored.

    Attributes:
        quantized: those in a scheme. Of linears that config.json does not describe, N and K are what the files hold.
        plain: those with a ``weight`` [n, k].
        unsized: linears in a scheme whose N and K neither config.json nor their tensors tell; both are 0.

    Where the experts of a layer differ, those stored alike are one entry. The scheme of stacked experts is that of the
    stacked tensors.
    """

    quantized: tuple[tuple[Linear, Scheme], ...] = ()
    plain: tuple[Linear, ...] = ()
    unsized: tuple[tuple[Linear, Scheme], ...] = ()


def stored_linears(checkpoint: Checkpoint, schemes: Schemes) -> Stored:
    """Sort the linears of the model, and further quantized modules of the files, by how they are stored.

    A linear counts as plain when its ``weight`` is there and no other tensor of its scheme is. Where the codes are
    called ``weight`` as well (FP8, INT8, NF4), its dtype must be a floating-point one that the scheme does not name.
    Everything is empty where no linear has a scheme.
    """
    present = modules(checkpoint)
    stacks: dict[int, tuple[Scheme, Scheme]] = {}  # with the first, so that its id stays its own
    quantized: list[tuple[Linear, Scheme]] = []
    plain: list[Linear] = []
    unsized: list[tuple[Linear, Scheme]] = []
    any_scheme = False

    def scheme_of(linear: Linear) -> Scheme | None:
        scheme = schemes(linear)
        if scheme is None or not linear.stacked:
            return scheme
        if id(scheme) not in stacks:
            stacks[id(scheme)] = (scheme, scheme.stacked())
        return stacks[id(scheme)][1]

    for linear in linears(checkpoint):
        scheme = scheme_of(linear)
        if scheme is None:
            plain.append(linear)
            continue
        any_scheme = True
        whole = [name for name in linear.names if is_plain(present.get(name, {}), scheme)]
        if whole:
            plain.append(linear.only(whole))
        if len(whole) < len(linear.names):
            left = set(whole)
            quantized.append((linear.only([name for name in linear.names if name not in left]), scheme))
    for linear in undescribed(checkpoint):
        scheme = scheme_of(linear)
        first = next(iter(scheme.required()), None) if scheme is not None else None
        names = [name for name in linear.names if first in present[name].keys() - {"weight"}]
        if scheme is None or not names:
            continue
        any_scheme = True
        linear = linear.only(names)
        # Of listed experts the majority of three counts, so that one that is damaged does not speak for all.
        sizes = Counter(scheme.solve(present[name]) for name in names[:3])
        size = sizes.most_common(1)[0][0]
        if size is None:
            unsized.append((linear, scheme))
            continue
        if linear.stacked:
            size = oriented(*size, linear.parallel, size_of(checkpoint.text_config, "hidden_size"))
        quantized.append((replace(linear, n=size[0], k=size[1]), scheme))
    return Stored(tuple(quantized), tuple(plain), tuple(unsized)) if any_scheme else Stored()


def is_plain(tensors: Mapping[str, Tensor], scheme: Scheme) -> bool:
    """Whether a linear with these tensors is stored as a plain ``weight``, and not in the scheme."""
    weight = tensors.get("weight")
    if weight is None or (scheme.parts.keys() & tensors.keys()) - {"weight"} - BESIDE:
        return False
    if "weight" not in scheme.parts:
        return True
    codes = scheme.alternatives("weight")
    return weight.dtype in FLOATS and not any(weight.dtype in part.dtypes for part in codes)
