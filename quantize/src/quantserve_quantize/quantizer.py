"""What a plugin's quantizer is, and what it gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from torch import Tensor, nn

from quantserve.api import Checkpoint, Linear, linears
from quantserve_quantize.options import checked

FEWEST = 128
"""Tokens that an expert has to see for statistics of its own; below it gets those of all experts of its layer."""


class Need(Enum):
    """What a quantizer needs to know about a linear beside its weight."""

    SQUARES = "squares"
    """The mean square of each input."""
    HESSIAN = "hessian"
    """The mean of x x^T over the calibration tokens."""
    GRADIENTS = "gradients"
    """The squared gradient of the loss for each weight (Fisher information), which needs the whole model in memory."""


@dataclass
class Statistics:
    """What calibration measured of one linear; None for what was not asked for.

    Attributes:
        squares: float32 [k], the mean of x^2 over the tokens.
        hessian: float32 [k, k], the mean of x x^T over the tokens.
        gradients: float32 [n, k], the mean over the samples of the squared gradient of the loss; None also where the
            loss does not depend on the linear.
        tokens: how many the linear has seen; those of an expert are the ones routed to it.
    """

    squares: Tensor | None = None
    hessian: Tensor | None = None
    gradients: Tensor | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Quantized:
    """A quantized linear.

    Attributes:
        tensors: what is written, by suffix (``qweight``).
        weight: float32 [n, k], what these tensors stand for.
        config: facts for `Quantizer.quantization_config`, kept by module.
    """

    tensors: Mapping[str, Tensor]
    weight: Tensor
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Block:
    """A decoder block that calibration runs, in float32.

    Attributes:
        name: its path, ``model.layers.0``.
        module: transformers' module; changes of its parameters are written.
        linears: those to quantize, by path.
        statistics: of each, by path.
        inputs: hidden states [tokens, hidden] of each sample, before the block.
        run: the block's output for one sample's hidden states [tokens, hidden].
    """

    name: str
    module: nn.Module
    linears: Mapping[str, Linear]
    statistics: Mapping[str, Statistics]
    inputs: list[Tensor]
    run: Any

    def module_of(self, path: str) -> nn.Module:
        """A module of the block by its path in the model."""
        return self.module.get_submodule(path.removeprefix(self.name + "."))


class Quantizer:
    """One method's quantizer; a plugin derives from it.

    Attributes:
        Options: a dataclass of `option` fields; they become options of the command.
        needs: what is to be measured; empty for a method that needs weights only, which then runs without transformers.
        dtype: of the tensors that stay unquantized, ``bfloat16`` or ``float16``; None keeps the source's.
        experts: whether listed experts are quantized, too.
    """

    Options: ClassVar[Any]
    needs: frozenset[Need] = frozenset()
    dtype: str | None = None
    experts: bool = False

    def __init__(self, options: Any) -> None:
        self.options = checked(options)

    def begin(self, checkpoint: Checkpoint, linears: Sequence[Linear]) -> None:
        """Look at the source and at the linears to quantize, before `refusal` and any work; may set `dtype`."""

    def refusal(self, linear: Linear) -> str:
        """Why a linear cannot be quantized, with the fix; "" when it can. Asked before any work."""
        return ""

    def prepare(self, block: Block) -> None:
        """Change the weights of a block without changing its output, before its linears are quantized.

        Statistics are those of the block as it was; whoever changes the input of a linear changes them accordingly.
        """

    def quantize(self, linear: Linear, weight: Tensor, statistics: Statistics) -> Quantized:
        """Quantize one weight, float32 [n, k]."""
        raise NotImplementedError

    @classmethod
    def dequantize(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
        """The weight, float32 [n, k], for which the stored tensors of a linear stand.

        Args:
            tensors: by suffix.
            config: the checkpoint's ``quantization_config``.
        """
        raise NotImplementedError

    def quantization_config(self, made: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """What config.json says as ``quantization_config``.

        Args:
            made: `Quantized.config` of every linear, by path.
        """
        raise NotImplementedError


def unquantized(checkpoint: Checkpoint, chosen: Sequence[Linear]) -> list[str]:
    """The linears that stay as they are, by path, and lm_head: for configs that name them.

    Args:
        checkpoint: the source.
        chosen: the linears to quantize.
    """
    quantized = {linear.name for linear in chosen}
    every = [one.name for linear in linears(checkpoint) for one in linear.each()]
    heads = [name.removesuffix(".weight") for name in checkpoint.tensors if name.endswith("lm_head.weight")]
    return [name for name in (*every, *heads) if name not in quantized]
