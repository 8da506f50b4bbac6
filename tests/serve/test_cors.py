"""CORS is closed unless configured."""

from __future__ import annotations

import asyncio

import pytest

from quantserve.serve.gateway.middleware.limits import Policy, layers

from .asgi_client import Answer, Upstream, request

PAGE = "https://chat.example.org"


def ask(origins: tuple[str, ...], method: str = "POST", origin: str = PAGE, **headers: str) -> Answer:
    app = layers(Upstream("m"), Policy(cors_origins=origins))
    given = {"origin": origin, **{key.replace("_", "-"): value for key, value in headers.items()}}
    return asyncio.run(request(app, method, "/v1/chat/completions", {}, headers=given))


def preflight(origins: tuple[str, ...], origin: str = PAGE, method: str = "POST") -> Answer:
    return ask(
        origins, "OPTIONS", origin,
        access_control_request_method=method, access_control_request_headers="authorization, x-stainless-os",
    )  # fmt: skip


def allowed(answer: Answer) -> list[str]:
    return [name for name in answer.headers if name.startswith("access-control-")]


def test_closed_by_default() -> None:
    assert allowed(ask(())) == []
    assert allowed(preflight(())) == []


def test_a_configured_page() -> None:
    answer = ask((PAGE,))
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert answer.headers["access-control-expose-headers"] == "x-request-id, retry-after"
    assert "access-control-allow-credentials" not in answer.headers
    assert "Origin" in answer.headers["vary"]
    answer = preflight((PAGE,))
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, PAGE)
    assert answer.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "https://chat.example.org.evil.example", "null", PAGE + ":1"]
)
def test_another_page(origin: str) -> None:
    assert "access-control-allow-origin" not in ask((PAGE,), origin=origin).headers
    answer = preflight((PAGE,), origin)
    assert (answer.status, answer.error["code"]) == (403, "cors_refused")
    assert origin in answer.error["message"]
    assert allowed(answer) == []


def test_another_method() -> None:
    assert preflight((PAGE,), method="DELETE").status == 403


def test_every_page() -> None:
    assert ask(("*",), origin="https://any.example").headers["access-control-allow-origin"] == "*"
    assert preflight(("*",), "https://any.example").headers["access-control-allow-origin"] == "*"


def test_errors_can_be_read_by_the_page() -> None:
    app = layers(Upstream("m"), Policy(cors_origins=(PAGE,), max_tokens=1))
    answer = asyncio.run(request(app, "POST", "/v1/completions", {"max_tokens": 2}, headers={"origin": PAGE}))
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (400, PAGE)
