"""Reads the models of a server from its API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantserve.errors import EngineError, UsageError, unknown_name
from quantserve_bench.request import Target
from quantserve_bench.tokens import Session


@dataclass(frozen=True)
class Served:
    """A model, as its server describes it.

    Attributes:
        id: in requests.
        method, bits: quantization; empty and None if unknown.
        max_model_len: in tokens, None when unknown.
        expected: performance profile as JSON.
        server: versions of the server's components.
    """

    id: str
    method: str = ""
    bits: Any = None
    max_model_len: int | None = None
    expected: Mapping[str, Any] | None = None
    server: Mapping[str, str] = field(default_factory=dict)


def served_models(target: Target) -> list[Served]:
    """The models of a server, from its ``/v1/models``.

    Raises:
        EngineError: it does not respond.
        UsageError: it refuses the API key, or has no such API.
    """
    session = Session(target)
    try:
        status, answer = session.ask("GET", "/v1/models")
        if status in (401, 403):
            raise UsageError(
                f"{target.url} refused the request with status {status}: {_words(answer)}\n  fix: set --api-key"
            )
        if status != 200 or not isinstance(answer, dict) or not isinstance(answer.get("data"), list):
            raise UsageError(
                f"{target.url} has no OpenAI-compatible API: /v1/models returned {status}\n  fix: correct --url"
            )
        version = _version(session)
    finally:
        session.close()
    return [_served(card, version) for card in answer["data"] if isinstance(card, dict) and "id" in card]


def _version(session: Session) -> dict[str, str]:
    try:
        status, answer = session.ask("GET", "/version")
    except EngineError:
        return {}
    known = status == 200 and isinstance(answer, dict)
    return {str(key): str(value) for key, value in answer.items()} if known else {}


def _served(card: Mapping[str, Any], server: Mapping[str, str]) -> Served:
    metadata = card.get("metadata") if isinstance(card.get("metadata"), dict) else {}
    assert metadata is not None
    length = card.get("max_model_len") or metadata.get("max_model_len")
    return Served(
        id=str(card["id"]),
        method=str(metadata.get("method") or ""),
        bits=metadata.get("bits"),
        max_model_len=length if isinstance(length, int) else None,
        expected=metadata.get("expected_performance") or None,
        server=server,
    )


def _words(answer: object) -> str:
    error = answer.get("error") if isinstance(answer, dict) else answer
    return str(error.get("message")) if isinstance(error, dict) else str(error)


def choose_models(served: Sequence[Served], names: Sequence[str]) -> list[Served]:
    """The named models, or all.

    Raises:
        UsageError: the server has no model of that name, or none at all.
    """
    by_id = {model.id: model for model in served}
    for name in names:
        if name not in by_id:
            raise UsageError(unknown_name("model", name, by_id))
    chosen = [by_id[name] for name in names] if names else list(served)
    if not chosen:
        raise UsageError("the server lists no models in /v1/models\n  fix: start a model on it, or correct --url")
    return chosen
