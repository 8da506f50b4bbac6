"""A model of transformers without its weights, into which one block at a time is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantserve.errors import CheckpointError, one_line
from quantserve_quantize.experts import list_experts
from quantserve_quantize.source import Weights


class Skeleton:
    """The modules of a causal language model, parameters on the meta device.

    Args:
        weights: the checkpoint.
        blocks: paths of the decoder blocks, in their order.

    Raises:
        CheckpointError: transformers does not know the model, or names its modules otherwise than the files do.
    """

    def __init__(self, weights: Weights, blocks: Sequence[str]) -> None:
        self.weights = weights
        self.blocks = list(blocks)
        self.model = build(weights)
        named = dict(self.model.named_modules())
        tied = getattr(self.model, "_tied_weights_keys", None) or ()
        parameters = {name for name, _ in self.model.named_parameters()} - set(tied)
        absent = [path for path in blocks if path not in named]
        absent += sorted(name for name in parameters if name not in weights.files)[:3]
        if absent:
            raise CheckpointError(
                f"{weights.folder}: transformers' modules of this model have other names than its files, or files lack "
                f"them: {', '.join(absent[:3])}\n  fix: use a method that needs no calibration"
            )

        siblings = len(self.model.get_submodule(self.blocks[0].rpartition(".")[0]))
        if siblings != len(self.blocks):
            raise CheckpointError(
                f"{weights.folder}: {siblings - len(self.blocks)} of {siblings} blocks have no linear to quantize, "
                "which calibration does not support\n  fix: use a method that needs no calibration"
            )

    def load(self, path: str) -> nn.Module:
        """Give a module its weights, in float32."""
        module = self.model.get_submodule(path)
        for name, parameter in list(module.named_parameters()):
            if parameter.is_meta:
                owner, _, leaf = name.rpartition(".")
                value = self.weights.finite(f"{path}.{name}")
                if value.shape != parameter.shape:
                    raise CheckpointError(
                        f"{path}.{name} of {self.weights.folder} is {list(value.shape)}; config.json makes it "
                        f"{list(parameter.shape)}"
                    )
                setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
        return module

    def unload(self, path: str) -> None:
        """Take the weights of a module away."""
        module = self.model.get_submodule(path)
        for name, parameter in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, nn.Parameter(parameter.to("meta"), requires_grad=False))

    @torch.no_grad()
    def embed(self, samples: Tensor) -> tuple[list[Tensor], dict[str, dict[str, Any]]]:
        """The input of the first block for each sample, and the further arguments of each block.

        Args:
            samples: token ids [samples, tokens].

        Returns:
            Hidden states [tokens, hidden] of each sample; and per block its arguments (masks, rotary embeddings),
            which are the same for all samples, as they have one length.
        """
        outside = self._load_outside(head=False)
        arguments: dict[str, dict[str, Any]] = {}
        first: list[Tensor] = []

        def recorder(path: str) -> Any:
            def forward(hidden: Tensor, *rest: Any, **kwargs: Any) -> Any:
                if path == self.blocks[0]:
                    first.append(hidden[0].clone())
                arguments[path] = {"rest": rest, "kwargs": kwargs}
                return hidden

            return forward

        decoder = self.model.get_decoder() if hasattr(self.model, "get_decoder") else self.model.base_model
        with contextlib.ExitStack() as stack:
            for path in self.blocks:
                stack.enter_context(_replaced_forward(self.model.get_submodule(path), recorder(path)))
            for sample in samples:
                decoder(input_ids=sample[None], use_cache=False)
        for path in outside:
            self.unload(path)
        return first, arguments

    @torch.no_grad()
    def logits(self, samples: Tensor, hidden: Sequence[Tensor]) -> Iterator[Tensor]:
        """The logits [tokens, vocabulary] of each sample, from the output [tokens, hidden] of the last block."""
        self._load_outside(head=True)
        with contextlib.ExitStack() as stack:
            for path in self.blocks:
                stack.enter_context(_replaced_forward(self.model.get_submodule(path), lambda x, *rest, **kwargs: x))
            for sample, state in zip(samples, hidden, strict=True):
                last = self.model.get_submodule(self.blocks[-1])
                last.forward = lambda *rest, state=state, **kwargs: state[None]
                yield self.model(input_ids=sample[None], use_cache=False).logits[0].float()

    def _load_outside(self, head: bool) -> set[str]:
        """Load what is not in a block; the head only where it is needed and has weights of its own."""
        inside = tuple(f"{path}." for path in self.blocks)
        found = {
            name.rpartition(".")[0]
            for name, parameter in self.model.named_parameters()
            if parameter.is_meta and not name.startswith(inside) and (head or not name.startswith("lm_head."))
        }
        tied = {path for path in found if f"{path}.weight" not in self.weights.files}
        for path in found - tied:
            self.load(path)
        if tied:
            self.model.tie_weights()
        return found - tied


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def run_block(module: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The output of a block for one sample [tokens, hidden]."""
    out = module(hidden[None], *arguments["rest"], **arguments["kwargs"])
    return (out[0] if isinstance(out, tuple) else out)[0]


def build(weights: Weights) -> Any:
    """transformers' model for a checkpoint, its parameters on the meta device and its buffers computed.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(weights.folder, trust_remote_code=False)
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"{weights.folder}: transformers cannot build this model: {one_line(error)}\n"
            "  fix: use a method that needs no calibration, or a newer transformers"
        ) from error
    list_experts(model, weights.files)
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters go to the meta device as soon as a module gets them; buffers stay: rotary embeddings need theirs."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
