"""Request defaults fill fields that the client leaves out, and change no others."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from quantserve.serve.replica.request_defaults import RequestDefaults

from .asgi_client import Upstream, request

CHAT = "/v1/chat/completions"
DEFAULTS = {"temperature": 0.2, "top_p": 0.9, "max_tokens": 64, "stop": ["<unk>", "</s>"], "stop_token_ids": [7]}


def completed(body: dict[str, Any], defaults: dict[str, Any] | None = None, path: str = CHAT) -> dict[str, Any]:
    upstream = Upstream("m")
    app = RequestDefaults(upstream, DEFAULTS if defaults is None else defaults)
    answer = asyncio.run(request(app, "POST", path, body, parts=2))
    assert answer.status == 200
    return dict(json.loads(upstream.bodies[0]))


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("given", [{}, dict.fromkeys(DEFAULTS)])
def test_absent_and_null_fields_get_the_default(given: dict[str, Any], path: str) -> None:
    assert completed({"model": "m", **given}, path=path) == {"model": "m", **DEFAULTS}


def test_the_client_wins() -> None:
    given = {"temperature": 0, "top_p": 1.0, "max_tokens": 1}
    assert {key: completed(given)[key] for key in given} == given


@pytest.mark.parametrize(
    ("given", "united"),
    [
        (None, ["<unk>", "</s>"]),
        ("\n", ["\n", "<unk>", "</s>"]),
        (["</s>", "a", "a"], ["</s>", "a", "<unk>"]),
        ([], ["<unk>", "</s>"]),
    ],
)
def test_stops_are_united(given: object, united: list[str]) -> None:
    assert completed({"stop": given})["stop"] == united
    assert completed({"stop_token_ids": [9, 7]})["stop_token_ids"] == [9, 7]


def test_a_wrong_stop_is_left_for_vllm_to_refuse() -> None:
    assert completed({"stop": 5})["stop"] == 5


def test_newer_name_of_max_tokens() -> None:
    assert "max_tokens" not in completed({"max_completion_tokens": 5})
    assert completed({"max_completion_tokens": None})["max_tokens"] == 64


def test_default_minimum_yields_to_the_clients_maximum() -> None:
    assert completed({"max_tokens": 3}, {"min_tokens": 10})["min_tokens"] == 3
    assert completed({}, {"min_tokens": 10})["min_tokens"] == 10


def untouched(body: bytes, defaults: dict[str, Any], path: str = CHAT, **kwargs: Any) -> None:
    upstream = Upstream("m")
    asyncio.run(request(RequestDefaults(upstream, defaults), "POST", path, body, **kwargs))
    assert upstream.bodies == [body]


def test_bodies_without_missing_defaults_are_not_changed() -> None:
    untouched(b'{ "temperature" : 1.0 }', {"temperature": 0.5})
    untouched(b'{"stop": ["a"] }', {"stop": ["a"]})
    untouched(b"not json", {})
    untouched(b"{ }", {"stop": [], "seed": None})
    untouched(b"{ }", DEFAULTS, path="/v1/embeddings")
    untouched(b"--x", DEFAULTS, headers={"content-type": "multipart/form-data"})


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_bad_json_is_a_400(body: bytes) -> None:
    answer = asyncio.run(request(RequestDefaults(Upstream("m"), DEFAULTS), "POST", CHAT, body))
    assert (answer.status, answer.error["code"]) == (400, "invalid_json")


def test_the_rest_of_a_body_is_not_changed() -> None:
    content = b'{"big": ' + b"9" * 40 + b', "x": [1.0e0, "\\u00e9 \\"}"], "stop" : null\n} \n'
    upstream = Upstream("m")
    asyncio.run(request(RequestDefaults(upstream, {"seed": 1}), "POST", CHAT, content))
    assert upstream.bodies == [content.rstrip()[:-1].rstrip() + b',"seed":1}']
    assert completed({"x": {}}, {"logit_bias": {5: -1.5}}) == {"x": {}, "logit_bias": {"5": -1.5}}
