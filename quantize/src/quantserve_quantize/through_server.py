"""Quality through a running server: the log-probabilities of prompt tokens, from its completions API."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from quantserve.errors import EngineError, UsageError
from quantserve_bench.request import Target
from quantserve_bench.tokens import Session
from quantserve_quantize.measures import Scores, partial

TOP = 20
"""Log-probabilities asked for a token, vLLM's default limit."""
AT_ONCE = 4
TIMEOUT_S = 600.0
Known = list[tuple[int, dict[int, float]]]
"""For each predicted token: the token of the text, and the log-probabilities that are known."""


def score(reference: str, models: list[str], ask: Callable[[str], Known]) -> tuple[Scores, dict[str, Scores]]:
    """Compare models with a reference.

    Args:
        reference: the model to compare with.
        models: the others.
        ask: `known` for one of them.
    """
    base = ask(reference)
    made = {}
    for model in models:
        own = ask(model)
        divergence = [partial(a, b) for (_, a), (_, b) in zip(base, own, strict=True)]
        same = [_top(a) == _top(b) for (_, a), (_, b) in zip(base, own, strict=True)]
        made[model] = Scores(_loss(own), torch.tensor(divergence, dtype=torch.float64), torch.tensor(same))
    return Scores(_loss(base)), made


def _loss(known: Known) -> Tensor:
    return torch.tensor([-found[token] for token, found in known], dtype=torch.float64)


def _top(found: dict[int, float]) -> int:
    return max(found, key=lambda token: found[token])


def known(target: Target, model: str, samples: Tensor, progress: Callable[[int, int], None]) -> Known:
    """What a server says of the tokens of all samples, one after the other.

    Args:
        target: address and API key.
        model: id.
        samples: token ids [samples, tokens].
        progress: called with samples done, and samples in all.

    Raises:
        EngineError: the server does not answer.
        UsageError: it refuses.
    """
    made: Known = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number, found in enumerate(pool.map(lambda row: _ask(target, model, row.tolist()), samples)):
            progress(number + 1, len(samples))
            made += found
    return made


def _ask(target: Target, model: str, ids: list[int]) -> Known:
    session = Session(target, timeout_s=TIMEOUT_S)
    body = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": TOP}
    try:
        status, answer = session.ask("POST", "/v1/completions", body)
    finally:
        session.close()
    if status != 200 or not isinstance(answer, dict):
        raise UsageError(
            f"{target.url} refused prompt log-probabilities of {model} with status {status}: {_words(answer)}"
        )
    rows = answer["choices"][0].get("prompt_logprobs")
    if not isinstance(rows, list) or len(rows) != len(ids):
        raise EngineError(f"{target.url} gave no prompt_logprobs for {model}; it is no server of vLLM")
    return [
        (token, {int(key): float(value["logprob"]) for key, value in row.items()})
        for token, row in zip(ids[1:], rows[1:], strict=True)
    ]


def _words(answer: Any) -> str:
    error = answer.get("error") if isinstance(answer, dict) else answer
    return str(error.get("message")) if isinstance(error, dict) else str(error)
