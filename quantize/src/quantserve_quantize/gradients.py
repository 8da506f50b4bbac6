"""The squared gradient of the loss for each weight: the diagonal of the empirical Fisher information.

A weight's gradient is a sum over the tokens of a sample. Its terms are squared, not the sum: both have one expectation
where tokens do not depend on each other, and thousands of tokens vary less than tens of samples. Memory holds the model
and the squares in float32 (8 bytes per weight), and the activations and logits of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantserve_quantize.skeleton import build
from quantserve_quantize.source import Weights


def squared(
    weights: Weights, samples: Tensor, modules: Collection[str], progress: Callable[[int, int], None]
) -> dict[str, Tensor]:
    """The mean over the samples of the sum over the tokens of the squared gradient of the mean loss of a sample.

    Args:
        weights: the checkpoint; all of it is loaded in float32.
        samples: token ids [samples, tokens].
        modules: the linears.
        progress: called with samples done and samples in all.

    Returns:
        float32 [n, k] by module.
    """
    model = build(weights)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        if parameter.is_meta and name in weights.files:
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(weights.finite(name), requires_grad=False))
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    sums = {name: torch.zeros_like(model.get_submodule(name).weight) for name in modules}
    for name, total in sums.items():
        model.get_submodule(name).register_forward_hook(partial(_note, total))
    # No parameter needs a gradient; what the embedding gives does, so that it reaches every output.
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: out.requires_grad_(True))
    for number, sample in enumerate(samples, start=1):
        logits = model(input_ids=sample[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits.float(), sample[1:]).backward()
        progress(number, len(samples))
    return {name: total.div_(len(samples)) for name, total in sums.items()}


def _note(total: Tensor, module: Any, inputs: tuple[Tensor, ...], out: Tensor) -> None:
    """Add the squares of a linear's gradient for each token, when the gradient of its output is known."""
    x = inputs[0].detach().reshape(-1, total.shape[1])

    def note(gradient: Tensor) -> None:
        total.addmm_(gradient.reshape(-1, len(total)).square().t(), x.square())

    if out.requires_grad:
        out.register_hook(note)
