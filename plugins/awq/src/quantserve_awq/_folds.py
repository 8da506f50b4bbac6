"""Find the operation before the linears of a block, into which the inverse of their scales is folded.

Nothing is known of the architecture: one run shows which module made the tensor that linears take, and a fold is used
only if the block's output stays as it was, first with random scales, then with those that the search found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantserve_quantize import Block

# Of the block's output less its input, and of its output: what float32 rounds differently in a folded block.
BRANCH_TOLERANCE = 1e-4
OUTPUT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Fold:
    """Linears with one input, whose columns are multiplied by s, and the operation before, which is divided by it.

    Attributes:
        linears: by path, those that are not quantized too.
        before: a norm, or a linear.
        offset: added to a norm's weight before it multiplies, 1 in Gemma.
        repeats: heads, times, width: each head of ``before`` is the input of several, as with grouped queries.
    """

    linears: Mapping[str, nn.Linear]
    before: nn.Module
    offset: float = 0.0
    repeats: tuple[int, int, int] | None = None

    @property
    def k(self) -> int:
        """The inputs of the linears."""
        return next(iter(self.linears.values())).in_features

    def fitting(self, scales: Tensor) -> Tensor:
        """The nearest scales [k] that it can take: one value for inputs that are the same output."""
        if self.repeats is None:
            return scales
        shaped = scales.view(self.repeats)
        return shaped.log().mean(1, keepdim=True).exp().expand_as(shaped).reshape(-1)

    def apply(self, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Multiply and divide the weights, by float32 scales [k] that fit.

        Args:
            scales: of the inputs.
            dtype: that a norm's weight is written in. Linears take the scales that it then has, so that rounding it
                changes nothing; 1 + w would lose digits otherwise.

        Returns:
            The scales that the linears took, float32 [k].
        """
        before, divisors = self.before, scales
        if isinstance(before, nn.Linear):
            if self.repeats is not None:
                divisors = scales.view(self.repeats)[:, 0].reshape(-1)
            before.weight.data = before.weight.data / divisors[:, None]
        else:
            factor = before.weight.data + self.offset
            written = (factor / scales - self.offset).to(dtype).to(torch.float32)
            rounded = factor / (written + self.offset)
            fits = (rounded / scales - 1).abs() < 0.5  # else 0, or nothing is left of it
            before.weight.data = torch.where(fits, written, before.weight.data)
            divisors = scales = torch.where(fits, rounded, 1.0)
        for linear in self.linears.values():
            linear.weight.data = linear.weight.data * scales
        if getattr(before, "bias", None) is not None:
            before.bias.data = before.bias.data / divisors
        return scales


def folds(block: Block, trial: Trial) -> Iterator[Fold]:
    """The folds of a block that leave its output as it was, in the order in which the linears run."""
    trace = _traced(block)
    for paths in trace.sharing(block):
        for fold in _candidates(block, trace, paths):
            some = torch.randn(fold.k, generator=torch.Generator().manual_seed(0)).mul_(0.5).exp_()
            if trial.keeps(fold, fold.fitting(some)):
                yield fold
                break


class Trial:
    """Runs a block with and without a fold, on one sample."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.hidden = block.inputs[0]
        self.output = block.run(self.hidden)
        branch = (self.output - self.hidden).norm(dim=-1)
        self.allowed = BRANCH_TOLERANCE * branch + OUTPUT_TOLERANCE * self.output.norm(dim=-1)

    def keeps(self, fold: Fold, scales: Tensor, dtype: torch.dtype = torch.float32) -> bool:
        """Whether every token's output stays the same under these scales; the weights are restored."""
        modules = [*fold.linears.values(), fold.before]
        saved = [(one, one.data) for module in modules for one in module.parameters(recurse=False)]
        fold.apply(scales, dtype)
        changed = (self.block.run(self.hidden) - self.output).norm(dim=-1)
        for parameter, data in saved:
            parameter.data = data
        return bool((changed <= self.allowed).all())


@dataclass
class _Trace:
    """The calls of a block's innermost modules: path, input, output. Holding the tensors keeps addresses unique."""

    calls: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)

    def sharing(self, block: Block) -> list[list[str]]:
        """Paths of linears with one input; only where one of them is quantized."""
        inputs: dict[tuple[int, int], list[str]] = {}
        for path, taken, _ in self.calls:
            if isinstance(block.module_of(path), nn.Linear):
                inputs.setdefault(_place(taken), []).append(path)
        return [paths for paths in inputs.values() if any(path in block.linears for path in paths)]

    def input_of(self, path: str) -> tuple[int, int]:
        return next(_place(taken) for one, taken, _ in self.calls if one == path)


def _traced(block: Block) -> _Trace:
    trace = _Trace()
    handles = []
    for name, module in block.module.named_modules():
        if next(module.children(), None) is None:
            path = f"{block.name}.{name}"

            def note(module: nn.Module, inputs: tuple[object, ...], out: object, path: str = path) -> None:
                if inputs and isinstance(inputs[0], Tensor) and isinstance(out, Tensor):
                    trace.calls.append((path, inputs[0], out))

            handles.append(module.register_forward_hook(note))
    block.run(block.inputs[0])
    for handle in handles:
        handle.remove()
    return trace


def _place(tensor: Tensor) -> tuple[int, int]:
    """The same for a tensor and a view of all of it."""
    return tensor.data_ptr(), tensor.numel()


def _candidates(block: Block, trace: _Trace, paths: list[str]) -> Iterator[Fold]:
    """What may come before linears: the norm that made their input, else a linear beside them, the latest first."""
    linears: dict[str, nn.Linear] = {path: block.module_of(path) for path in paths}
    k = linears[paths[0]].in_features
    source = trace.input_of(paths[0])
    made_by = [block.module_of(path) for path, _, out in trace.calls if _place(out) == source]
    for module in made_by:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == (k,):
            yield Fold(linears, module)
            yield Fold(linears, module, offset=1.0)
    if made_by:
        return
    parent = paths[0].rpartition(".")[0]
    ran = [path for path, _, _ in trace.calls]
    for path in reversed(ran[: ran.index(paths[0])]):
        before = block.module_of(path)
        if path.rpartition(".")[0] != parent or not isinstance(before, nn.Linear) or k % before.out_features:
            continue
        n = before.out_features
        width = getattr(block.module_of(parent), "head_dim", None) if n != k else None
        if n == k:
            yield Fold(linears, before)
        elif isinstance(width, int) and n % width == 0:
            yield Fold(linears, before, repeats=(n // width, k // n, width))
