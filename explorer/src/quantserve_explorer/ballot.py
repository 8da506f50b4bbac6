"""A vote as a client sends it, checked."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from quantserve.serve.asgi import Refused, parse_object

MOST_BYTES: Final = 64 << 10
MOST_MODELS: Final = 8
MOST_CHARACTERS: Final = 16_000
FIELDS: Final = ("models", "winner", "blind", "prompt")


@dataclass(frozen=True)
class Vote:
    """A comparison of models and which one was better.

    Attributes:
        time: Unix seconds.
        models: ids, at least two.
        methods: quantization method of each.
        winner: one of `models`; None for a tie.
        blind: whether the names were hidden.
        prompt: what was asked, if the client told.
    """

    time: float
    models: tuple[str, ...]
    methods: tuple[str, ...]
    winner: str | None
    blind: bool
    prompt: str | None


def ballot(body: bytes, methods: Mapping[str, str]) -> Vote:
    """The vote in a request body.

    Args:
        methods: quantization method of each model of the server.

    Raises:
        Refused: 400, with the field that is wrong.
    """
    fields = parse_object(body)
    for name in fields:
        if name not in FIELDS:
            raise _wrong(name[:80], f"is unknown; a vote has {', '.join(FIELDS)}")
    models = fields.get("models")
    if not isinstance(models, list) or not 2 <= len(models) <= MOST_MODELS:
        raise _wrong("models", f"must be a list of 2 to {MOST_MODELS} model ids, got {_shown(models)}")
    for index, model in enumerate(models):
        if not isinstance(model, str) or model not in methods:
            raise _wrong(f"models[{index}]", f"must be the id of a model of this server, got {_shown(model)}")
        if model in models[:index]:
            raise _wrong(f"models[{index}]", f"names {_shown(model)} a second time")
    if "winner" not in fields:
        raise _wrong("winner", "is missing; null is a tie")
    winner = fields["winner"]
    if winner is not None and winner not in models:
        raise _wrong("winner", f"must be one of `models`, or null for a tie, got {_shown(winner)}")
    blind = fields.get("blind", False)
    if not isinstance(blind, bool):
        raise _wrong("blind", f"must be true or false, got {_shown(blind)}")
    return Vote(time.time(), tuple(models), tuple(methods[model] for model in models), winner, blind, _prompt(fields))


def _prompt(fields: Mapping[str, Any]) -> str | None:
    prompt = fields.get("prompt")
    if prompt is None:
        return None
    if not isinstance(prompt, str):
        raise _wrong("prompt", f"must be text, got {_shown(prompt)}")
    if len(prompt) > MOST_CHARACTERS:
        raise _wrong("prompt", f"has {len(prompt)} characters; at most {MOST_CHARACTERS} are stored")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise _wrong("prompt", "has half of a surrogate pair, which is no character") from None
    return prompt


def _wrong(field: str, problem: str) -> Refused:
    return Refused(400, f"`{field}` {problem}.", param=field, code="invalid_vote")


def _shown(value: object) -> str:
    return json.dumps(value)[:80]
