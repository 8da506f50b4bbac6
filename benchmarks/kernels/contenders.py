"""What is compared: something to call with x, and copies of its weight that together exceed the cache."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels.formats import FORMATS
from benchmarks.kernels.results import TORCH
from benchmarks.kernels.shapes import Shape
from quantserve_kernels import PackedWeight, instruction_set, linear
from quantserve_kernels._ops import allocate_codes

Call = Callable[[Tensor], object]


class Rotation:
    """The same call on one copy of a weight after the other. Whoever shares copies shares the rotation."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.count = 0

    def next(self) -> Call:
        """The call on the copy that was not read for the longest time."""
        call = self.calls[self.count % len(self.calls)]
        self.count += 1
        return call


@dataclass
class Contender:
    """One column of times.

    Attributes:
        name: what the results call it.
        rotation: its calls.
        nbytes: what one call reads of the weight.
        isa: the instruction set our kernels have to use; None for what is not ours.
        single: whether it only takes part at batch 1.
    """

    name: str
    rotation: Rotation
    nbytes: int
    isa: str | None = None
    single: bool = False

    def seconds(self, x: Tensor) -> float:
        """The time of one call."""
        if self.isa is not None:
            instruction_set(self.isa)
        call = self.rotation.next()
        began = time.perf_counter()
        call(x)
        return time.perf_counter() - began


def copies(nbytes: int, working_set: int) -> int:
    """How many copies of a weight are more than `working_set` bytes together."""
    return working_set // nbytes + 1


def torch_linear(shape: Shape, working_set: int) -> Contender:
    """`torch.nn.functional.linear` in bfloat16."""
    first = normal_weight(shape)
    weights = [first, *(first.clone() for _ in range(copies(first.nbytes, working_set) - 1))]

    def call(weight: Tensor) -> Call:
        return lambda x: torch.nn.functional.linear(x, weight)

    return Contender(TORCH, Rotation([call(weight) for weight in weights]), first.nbytes)


def normal_weight(shape: Shape) -> Tensor:
    """A bfloat16 weight whose first channels repeat."""
    strip = torch.randn(512, shape.k, generator=torch.Generator().manual_seed(1)).mul_(0.02).bfloat16()
    return strip.repeat(-(-shape.n // 512), 1)[: shape.n].contiguous()


def ours(name: str, weight: PackedWeight, working_set: int, isa: str) -> Contender:
    """Our kernel on a format, with one instruction set."""
    weights = [weight, *(clone(weight) for _ in range(copies(weight.nbytes, working_set) - 1))]

    def call(weight: PackedWeight) -> Call:
        return lambda x: linear(x, weight)

    return Contender(name, Rotation([call(weight) for weight in weights]), weight.nbytes, isa)


def forced(contender: Contender, isas: Sequence[str]) -> list[Contender]:
    """The same with other instruction sets, on the same copies."""
    return [
        Contender(f"{contender.name} @{isa}", contender.rotation, contender.nbytes, isa, single=True) for isa in isas
    ]


def clone(weight: PackedWeight) -> PackedWeight:
    """A copy in memory of the same kind: codes in huge pages, as `pack` puts them."""
    tensors = {name: tensor.clone() for name, tensor in weight.tensors().items() if name != "codes"}
    return dataclasses.replace(weight, codes=allocate_codes(weight.codes.numel()).copy_(weight.codes), **tensors)


def bytes_needed(shape: Shape, formats: Sequence[str], working_set: int) -> int:
    """What all copies of a shape's contenders take at most, vLLM's and the making of the largest included."""
    elements = shape.n * shape.k
    weights = [2 * elements, 2 * elements, elements // 2, *(int(FORMATS[name].bits * elements / 8) for name in formats)]
    return int(1.15 * sum(weight * copies(weight, working_set) for weight in weights)) + 3 * elements
