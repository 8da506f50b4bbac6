"""The squared gradient of the loss for each weight: the diagonal of the empirical Fisher information.

Memory holds the model and the squares in float32 (8 bytes per weight), and the activations and logits of one sample.
"""

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
    chosen = {name: model.get_submodule(name).weight.requires_grad_(True) for name in modules}
    sums = {name: torch.zeros_like(weight) for name, weight in chosen.items()}
    for name, weight in chosen.items():

        def note(weight: Tensor, total: Tensor = sums[name]) -> None:
            assert weight.grad is not None
            total.addcmul_(weight.grad, weight.grad)
            weight.grad = None  # so that one gradient is in memory, not all

        weight.register_post_accumulate_grad_hook(note)
    for number, sample in enumerate(samples, start=1):
        logits = model(input_ids=sample[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits.float(), sample[1:]).backward()
        progress(number, len(samples))
    return {name: total.div_(len(samples)) for name, total in sums.items()}
