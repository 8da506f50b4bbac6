"""The stored tensors of a quantized linear, as data.

A `Scheme` names the tensors that take the place of a linear's ``weight``, with shapes in terms of N = out_features and
K = in_features. Everything that holds for all formats alike follows from it: missing and misshapen tensors, what a
tensor-parallel rank may cut, bytes in files and in memory, and the parameters of vLLM's layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from quantserve.checkpoint import Tensor

Axis = Literal["n", "k", "nk", "e"]
Scales = Literal["none", "tensor", "channel", "group", "block"]


@dataclass(frozen=True, slots=True)
class Dim:
    """A dimension of a stored tensor that grows with the linear.

    Attributes:
        axis: ``n``, ``k``, ``nk`` (a flattened weight, n times k elements) or ``e`` (stacked experts).
        per: elements of the axis for each index of this dimension: 8 codes in an int32 word, 128 inputs in a group;
            ``Fraction(32, 3)`` for 3-bit codes in int32 words.
        partial: whether the last index may stand for fewer elements, as in 128 x 128 blocks.
        block: elements that are stored together though each has its index, as in GGUF's block formats: Q4_K keeps 256
            elements of a row in 144 bytes, and its reader gives the shape in elements.
        free: whether ranks may cut between the elements of an index, since the engine's side takes the words of the
            file apart before (HQQ, whose bytes hold codes of distant channels).
    """

    axis: Axis
    per: Fraction = Fraction(1)
    partial: bool = False
    block: int = 1
    free: bool = False

    def size(self, n: int, k: int, experts: int = 0) -> int | None:
        """Length for a linear of [n, k]; None where the axis is no multiple of what one index stands for."""
        axis = self.axis
        elements = n if axis == "n" else k if axis == "k" else n * k if axis == "nk" else experts
        if elements % self.block:
            return None
        whole, rest = divmod(elements * self.per.denominator, self.per.numerator)
        if self.partial:
            return whole + bool(rest)
        return None if rest else whole

    def elements(self, size: int) -> int | None:
        """Elements of the axis in so many indices; None where the length does not tell."""
        found, rest = divmod(size * self.per.numerator, self.per.denominator)
        return None if self.partial or rest else found

    @property
    def multiple(self) -> int:
        """Elements of the axis that cannot be divided: a whole group or block, or the codes that share words."""
        return lcm(self.per.numerator, self.block)


def N(per: int | Fraction = 1, *, partial: bool = False, block: int = 1, free: bool = False) -> Dim:
    """Out_features, `per` of them for each index; see `Dim`."""
    return Dim("n", Fraction(per), partial, block, free)


def K(per: int | Fraction = 1, *, partial: bool = False, block: int = 1, free: bool = False) -> Dim:
    """In_features, `per` of them for each index; see `Dim`."""
    return Dim("k", Fraction(per), partial, block, free)


def NK(per: int | Fraction = 1, *, partial: bool = False, block: int = 1, free: bool = False) -> Dim:
    """All n x k elements of a flattened weight, `per` of them for each index; see `Dim`."""
    return Dim("nk", Fraction(per), partial, block, free)


def E() -> Dim:
    """The experts of a layer, stacked in one tensor. Needed only where they are not the first dimension."""
    return Dim("e")


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of a quantized linear.

    Attributes:
        shape: a `Dim`, a fixed length, or None for a length that only the file knows.
        dtypes: names that are accepted: those of safetensors (``("F16", "BF16")``), or that a reader gives a block
            format (``("Q4_K",)``); one dimension then says how long the blocks are.
        optional: whether a linear may do without.
    """

    shape: tuple[Dim | int | None, ...]
    dtypes: tuple[str, ...]
    optional: bool = False

    def sizes(self, n: int, k: int, experts: int = 0) -> tuple[int | None, ...]:
        """The shape for a linear of [n, k]; None where any length, or no length, is right."""
        return tuple(one.size(n, k, experts) if isinstance(one, Dim) else one for one in self.shape)

    def fits(self, shape: tuple[int, ...], n: int, k: int, experts: int = 0) -> bool:
        """Whether a stored shape is this part's for a linear of [n, k]."""
        if len(shape) != len(self.shape):
            return False
        for found, one in zip(shape, self.shape, strict=True):
            if one is not None and found != (one.size(n, k, experts) if isinstance(one, Dim) else one):
                return False
        return True


@dataclass(frozen=True)
class Scheme:
    """How one linear is stored.

    Attributes:
        parts: suffix -> tensor, or alternatives of which one is stored; the codes come first. Dots are allowed:
            ``weight.absmax``. Where the codes are called ``weight``, a linear whose weight is floating point in a
            dtype that is not theirs counts as unquantized.
        bits: width of a code.
        group_size: inputs that share a scale; -1 for all of K.
        scales: what a scale belongs to.
        activation_bits: 16, or what the method rounds activations to. Predictions take what that gains from
            ``quantserve_kernel``, because not every kernel of a method does it.
        kept: bits of a weight in the engine's memory, scales included; None: as many as stored.

    A scheme describes one linear of [n, k]. Where a tensor stacks the experts of a layer, they are its first dimension,
    and a weight of two dimensions may be stored as [e, n, k] or [e, k, n]; `stacked` makes that of it.
    """

    parts: Mapping[str, Part | tuple[Part, ...]]
    bits: float
    group_size: int = -1
    scales: Scales = "group"
    activation_bits: int = 16
    kept: float | None = None

    def alternatives(self, suffix: str) -> tuple[Part, ...]:
        """The parts that may be stored under a suffix."""
        part = self.parts[suffix]
        return part if isinstance(part, tuple) else (part,)

    def stacked(self) -> Scheme:
        """The scheme of a layer's experts in one tensor each; the same where it names `E` itself."""
        every = {suffix: self.alternatives(suffix) for suffix in self.parts}
        if any(
            isinstance(one, Dim) and one.axis == "e" for parts in every.values() for part in parts for one in part.shape
        ):
            return self
        return replace(self, parts={suffix: tuple(_stacked(parts)) for suffix, parts in every.items()})

    def required(self) -> tuple[str, ...]:
        """The suffixes that every linear must have."""
        return tuple(suffix for suffix in self.parts if not self.alternatives(suffix)[0].optional)

    def is_group(self, dim: Dim) -> bool:
        """Whether an index of a dimension stands for the elements that share a scale, and not for a word of codes."""
        return dim.partial or (dim.axis in ("k", "nk") and dim.per == self.group_size)

    def fits(self, tensors: Mapping[str, Tensor], n: int, k: int) -> bool:
        """Whether stored tensors, by suffix, are those of a linear of [n, k]: complete, of these shapes and dtypes."""
        for suffix in self.parts:
            tensor, alternatives = tensors.get(suffix), self.alternatives(suffix)
            if tensor is None:
                if not alternatives[0].optional:
                    return False
            elif not any(part.fits(tensor.shape, n, k) and tensor.dtype in part.dtypes for part in alternatives):
                return False
        return True

    def solve(self, tensors: Mapping[str, Tensor]) -> tuple[int, int] | None:
        """N and K of a linear with these stored tensors; None where their shapes do not tell."""
        found: dict[Axis, int] = {}
        for suffix in self.parts:
            if "n" in found and "k" in found:
                break
            shape, wanted = tensors[suffix].shape if suffix in tensors else (), self.alternatives(suffix)[0].shape
            for size, one in zip(shape, wanted, strict=True) if len(shape) == len(wanted) else ():
                if isinstance(one, Dim) and (elements := one.elements(size)):
                    found.setdefault(one.axis, elements)
        return (found["n"], found["k"]) if {"n", "k"} <= found.keys() else None


def _stacked(parts: tuple[Part, ...]) -> Iterator[Part]:
    for part in parts:
        for shape in dict.fromkeys((part.shape, part.shape[::-1] if len(part.shape) == 2 else part.shape)):
            yield replace(part, shape=(E(), *shape))
