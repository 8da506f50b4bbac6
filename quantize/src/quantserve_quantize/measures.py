"""What a model lost against a reference, from the distributions that both give for the same tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

WORST = 8
CONTEXT = 12
"""Tokens shown before a worst token."""


@dataclass
class Scores:
    """Per predicted token, over all samples one after the other.

    Attributes:
        loss: float64, -log of the probability that the model gives to the token of the text, in nats.
        divergence: float64, the KL divergence of the model's distribution from the reference's, in nats; a lower bound
            where distributions are known in part. Empty for the reference.
        same: bool, whether both find the same token most probable.
        blocks: relative error of the output of each block, by path; empty where only the output is known.
    """

    loss: Tensor
    divergence: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    same: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    blocks: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(float(self.loss.mean()))


def full(reference: Tensor, model: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence [tokens] and agreement [tokens] of whole distributions, log-probabilities [tokens, vocabulary]."""
    divergence = torch.nn.functional.kl_div(model, reference, reduction="none", log_target=True).sum(-1)
    return divergence.double().clamp_min(0), reference.argmax(-1) == model.argmax(-1)


def partial(reference: Mapping[int, float], model: Mapping[int, float]) -> float:
    """A lower bound of the divergence of two distributions, each known for some tokens as log-probabilities.

    The tokens that both have are told apart, and all others count as one (merging outcomes never raises a divergence).
    """
    known = reference.keys() & model.keys()
    p = [math.exp(reference[token]) for token in known]
    q = [math.exp(model[token]) for token in known]
    p.append(max(1 - sum(p), 0.0))
    q.append(max(1 - sum(q), 1e-12))
    return max(0.0, sum(a * math.log(a / max(b, 1e-300)) for a, b in zip(p, q, strict=True) if a > 0))


def summary(scores: Scores, reference: Scores) -> dict[str, Any]:
    """The figures of a model as plain data."""
    made: dict[str, Any] = {"tokens": len(scores.loss), "perplexity": scores.perplexity}
    made["perplexity_ratio"] = scores.perplexity / reference.perplexity
    if len(scores.divergence):
        made |= {
            "kl_mean": float(scores.divergence.mean()),
            "kl_median": float(scores.divergence.median()),
            "kl_99.9": float(scores.divergence.quantile(0.999)),
            "same_top": float(scores.same.double().mean()),
        }
    if scores.blocks:
        made["blocks"] = dict(scores.blocks)
    return made


def worst(scores: Scores, samples: Tensor, decode: Any) -> list[dict[str, Any]]:
    """The tokens with the largest divergence, with the text before them.

    Args:
        scores: of a model.
        samples: token ids [samples, tokens].
        decode: token ids -> text.
    """
    predicted = samples.shape[1] - 1
    found = []
    for index in scores.divergence.topk(min(WORST, len(scores.divergence))).indices.tolist():
        sample, position = divmod(index, predicted)
        before = samples[sample, max(0, position + 1 - CONTEXT) : position + 1].tolist()
        token = samples[sample, position + 1 : position + 2].tolist()
        found.append({"divergence": float(scores.divergence[index]), "before": decode(before), "token": decode(token)})
    return found


def by_position(scores: Scores, length: int) -> Sequence[float]:
    """The mean divergence at each position of a sample."""
    return [float(value) for value in scores.divergence.view(-1, length - 1).mean(0)]
