"""The squared gradient of the loss for each weight: the diagonal of the empirical Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from quantserve_quantize.skeleton import build
from quantserve_quantize.source import Weights


def squared(
    weights: Weights, samples: Tensor, modules: Collection[str], progress: Callable[[int, int], None]
) -> dict[str, Tensor]:
    """The mean over the samples of the squared gradient of the mean loss of a sample.

    Args:
        weights: the checkpoint; all of it is loaded in float32, and as much again for gradients and their squares.
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
    chosen = {name: model.get_submodule(name).weight.requires_grad_(True) for name in modules}
    sums = {name: torch.zeros_like(weight) for name, weight in chosen.items()}
    for number, sample in enumerate(samples, start=1):
        logits = model(input_ids=sample[None], use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.float(), sample[1:])
        for name, gradient in zip(chosen, torch.autograd.grad(loss, list(chosen.values())), strict=True):
            sums[name].addcmul_(gradient, gradient)
        progress(number, len(samples))
    return {name: total.div_(len(samples)) for name, total in sums.items()}
