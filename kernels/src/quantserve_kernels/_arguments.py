"""A packed weight as the operators take it: seven tensors and four numbers, in the order of their schemas."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Packed(NamedTuple):
    """The fields of a `PackedWeight`, which describes them."""

    codes: Tensor
    table: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    rows: Tensor | None
    cols: Tensor | None
    vals: Tensor | None
    bits: int
    n: int
    k: int
    group_size: int


class LinearArguments(NamedTuple):
    """The arguments of `codebook_linear`."""

    x: Tensor
    weight: Packed
    bias: Tensor | None


class ExpertsArguments(NamedTuple):
    """The arguments of `codebook_experts`."""

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    activation: str
    w13: Packed
    w13_bias: Tensor | None
    w2: Packed
    w2_bias: Tensor | None


TENSORS, NUMBERS = Packed._fields[:7], Packed._fields[7:]


def _declared(owner: str = "") -> tuple[str, str]:
    """The tensors of a weight and its bias, and its numbers, in the language of schemas."""
    kinds = {name: "Tensor" if name in ("codes", "table") else "Tensor?" for name in (*TENSORS, "bias")}
    tensors = ", ".join(f"{kind} {owner}{name}" for name, kind in kinds.items())
    return tensors, ", ".join(f"int {owner}{name}" for name in NUMBERS)


LINEAR = "codebook_linear(Tensor x, {}, {}) -> Tensor".format(*_declared())
EXPERTS = (
    "codebook_experts(Tensor x, Tensor topk_ids, Tensor topk_weights, str activation, "
    "{0[0]}, {1[0]}, {0[1]}, {1[1]}) -> Tensor".format(_declared("w13_"), _declared("w2_"))
)
PACK = "pack_codes(Tensor codes, int bits, int group_size, bool columns=False) -> Tensor"


def tensors_of(weight: Any) -> tuple[Tensor | None, ...]:
    """The tensors of a `PackedWeight` or `Linear`."""
    return weight.codes, weight.table, weight.scales, weight.zeros, weight.rows, weight.cols, weight.vals


def numbers_of(weight: Any) -> tuple[int, int, int, int]:
    """Its numbers."""
    return weight.bits, weight.n, weight.k, weight.group_size


def of_linear(arguments: tuple[Any, ...]) -> LinearArguments:
    """The arguments of `codebook_linear` as torch passes them."""
    x, *tensors, bias = arguments[:9]
    return LinearArguments(x, Packed(*tensors, *arguments[9:]), bias)


def of_experts(arguments: tuple[Any, ...]) -> ExpertsArguments:
    """The arguments of `codebook_experts` as torch passes them."""
    x, ids, weights, activation = arguments[:4]
    (*first, w13_bias), (*second, w2_bias) = arguments[4:12], arguments[12:20]
    w13, w2 = Packed(*first, *arguments[20:24]), Packed(*second, *arguments[24:])
    return ExpertsArguments(x, ids, weights, activation, w13, w13_bias, w2, w2_bias)
