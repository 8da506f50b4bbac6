"""Quality through transformers, in float32: all models advance block by block, so one block of each is in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantserve.errors import UsageError
from quantserve_quantize.measures import Scores, full
from quantserve_quantize.run import blocks_of
from quantserve_quantize.skeleton import Skeleton, run_block
from quantserve_quantize.source import Weights

Progress = Callable[[str, int, int], None]


@torch.no_grad()
def score(
    reference: Weights, models: Mapping[str, Weights], samples: Tensor, progress: Progress
) -> tuple[Scores, dict[str, Scores]]:
    """Compare models with a reference.

    Args:
        reference: unquantized weights.
        models: of the same architecture, by label.
        samples: token ids [samples, tokens].
        progress: called with what is done, how much of it, and how much there is.

    Returns:
        The scores of the reference, and of each model.

    Raises:
        UsageError: a model has other blocks than the reference.
    """
    blocks = blocks_of(reference)
    skeletons: dict[str | None, Skeleton] = {None: Skeleton(reference, blocks)}
    for label, weights in models.items():
        if blocks_of(weights) != blocks:
            raise UsageError(
                f"{weights.folder} has other blocks than {reference.folder}\n  fix: give the model it was made from"
            )
        skeletons[label] = Skeleton(weights, blocks)
    hidden: dict[str | None, list[Tensor]] = {}
    arguments: dict[str | None, dict[str, dict[str, Any]]] = {}
    for key, skeleton in skeletons.items():
        hidden[key], arguments[key] = skeleton.embed(samples)
    errors: dict[str, dict[str, float]] = {label: {} for label in models}
    for number, path in enumerate(blocks):
        progress("blocks", number, len(blocks))
        for key, skeleton in skeletons.items():
            module = skeleton.load(path)
            hidden[key] = [run_block(module, state, arguments[key][path]) for state in hidden[key]]
            skeleton.unload(path)
        for label in models:
            errors[label][path] = _relative(hidden[label], hidden[None])
    progress("blocks", len(blocks), len(blocks))
    return _scores(skeletons, hidden, samples, errors, progress)


def _relative(states: list[Tensor], of: list[Tensor]) -> float:
    error = sum(float((a - b).double().square().sum()) for a, b in zip(states, of, strict=True))
    return float((error / max(sum(float(b.double().square().sum()) for b in of), 1e-300)) ** 0.5)


def _scores(
    skeletons: Mapping[str | None, Skeleton],
    hidden: Mapping[str | None, list[Tensor]],
    samples: Tensor,
    errors: Mapping[str, Mapping[str, float]],
    progress: Progress,
) -> tuple[Scores, dict[str, Scores]]:
    streams = {key: skeleton.logits(samples, hidden[key]) for key, skeleton in skeletons.items()}
    losses: dict[str | None, list[Tensor]] = {key: [] for key in skeletons}
    divergences: dict[str, list[Tensor]] = {label: [] for label in errors}
    same: dict[str, list[Tensor]] = {label: [] for label in errors}
    for number, sample in enumerate(samples):
        progress("logits", number, len(samples))
        logs = {key: next(stream)[:-1].log_softmax(-1) for key, stream in streams.items()}
        for key, log in logs.items():
            losses[key].append(-log.gather(1, sample[1:, None])[:, 0].double())
        for label in errors:
            divergence, agree = full(logs[None], logs[label])
            divergences[label].append(divergence)
            same[label].append(agree)
    progress("logits", len(samples), len(samples))
    made = {
        label: Scores(torch.cat(losses[label]), torch.cat(divergences[label]), torch.cat(same[label]), errors[label])
        for label in errors
    }
    return Scores(torch.cat(losses[None])), made
