"""Request ids and the record of a request."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from quantserve.serve.asgi import Disconnected, Guard, Refused, header
from quantserve.serve.gateway.middleware.trace import Trace, Traced, trace_of

from .asgi_client import Answer, Upstream, request


class Recorder:
    """An app that notes what reaches it, answers in three pieces, and may fail."""

    def __init__(self, failure: Exception | None = None, pause_s: float = 0.0) -> None:
        self.failure = failure
        self.pause_s = pause_s
        self.scope: Scope = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        trace = trace_of(scope)
        trace.model, trace.replica = "demo", "r1"
        while (await receive()).get("more_body"):
            pass
        if self.failure:
            raise self.failure
        await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Other", b"1")]})
        for piece in (b"", b"one", b"", b"three"):
            await asyncio.sleep(self.pause_s)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def ask(app: Any, method: str = "POST", path: str = "/v1/completions", body: object = b"1234", **kw: Any) -> Answer:
    return asyncio.run(request(app, method, path, body, **kw))


@pytest.mark.parametrize("given", ["a", "Trace 7/u", "~" * 128, "req_01-AZ.b:c"])
def test_a_clients_id_is_kept(given: str) -> None:
    seen: list[Trace] = []
    app = Recorder()
    answer = ask(Traced(app, [seen.append]), headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == given
    assert header(app.scope, b"x-request-id").decode() == given
    assert [trace.id for trace in seen] == [given]


def test_a_long_client_address_is_cut() -> None:
    """A proxy on this machine may put anything into X-Forwarded-For."""
    seen: list[Trace] = []
    traced = Traced(Recorder(), [seen.append])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await traced({**scope, "client": ("x" * 50_000, 1)}, receive, send)

    ask(app, "GET", "/")
    assert [len(trace.client) for trace in seen] == [64]


@pytest.mark.parametrize("given", [None, "", "x" * 129, "tab\there", "ümlaut", "nul\0"])
def test_otherwise_one_is_made(given: str | None) -> None:
    app = Recorder()
    headers = {} if given is None else {"x-request-id": given}
    answers = [ask(Traced(app), headers=headers) for _ in range(2)]
    names = {answer.headers["x-request-id"] for answer in answers}
    assert len(names) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", name) for name in names)
    sent = [value for key, value in app.scope["headers"] if key == b"x-request-id"]
    assert sent == [answers[1].headers["x-request-id"].encode()]


def test_an_apps_own_id_does_not_win() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": [(b"x-request-id", b"theirs")]})
        await send({"type": "http.response.body"})

    async def collect() -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = []

        async def send(message: Any) -> None:
            found.extend(message.get("headers", ()))

        scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"x-request-id", b"ours")]}
        await Traced(app)(scope, None, send)  # type: ignore[arg-type]
        return found

    assert asyncio.run(collect()) == [(b"x-request-id", b"ours")]


def test_the_record() -> None:
    seen: list[Trace] = []
    ask(Traced(Recorder(pause_s=0.02), [seen.append]), body=b"x" * 1000, parts=4)
    (trace,) = seen
    assert (trace.method, trace.path, trace.status) == ("POST", "/v1/completions", 200)
    assert (trace.model, trace.replica) == ("demo", "r1")
    assert (trace.bytes_in, trace.bytes_out, trace.chunks) == (1000, 8, 2)
    assert trace.first_byte_s is not None
    assert trace.total_s is not None
    assert 0.04 <= trace.first_byte_s < trace.total_s - 0.03
    assert (trace.error_code, trace.client_left) == ("", False)


def test_errors_are_recorded_with_their_code() -> None:
    seen: list[Trace] = []
    answer = ask(Traced(Guard(Recorder(Refused(404, "no such model", code="model_not_found"))), [seen.append]))
    assert answer.headers["x-request-id"] == seen[0].id
    assert (seen[0].status, seen[0].error_code) == (404, "model_not_found")
    ask(Traced(Guard(Recorder(RuntimeError("secret"))), [seen.append]))
    assert (seen[1].status, seen[1].error_code) == (500, "")


def test_a_client_that_leaves() -> None:
    seen: list[Trace] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        raise Disconnected

    ask(Traced(Guard(app), [seen.append]), leave_after=1)
    assert (seen[0].status, seen[0].client_left, seen[0].bytes_out) == (200, True, 1)

    async def complete(scope: Scope, receive: Receive, send: Send) -> None:
        await Upstream("m")(scope, receive, send)
        assert (await receive())["type"] == "http.disconnect"

    ask(Traced(complete, [seen.append]), leave_after=2)
    assert seen[1].client_left is False  # it had everything


def test_the_record_is_complete_when_the_app_raises() -> None:
    seen: list[Trace] = []
    assert ask(Traced(Recorder(RuntimeError("bug")), [seen.append])).status == 500  # from a layer further out
    assert seen[0].status == 0
    assert seen[0].total_s is not None


def test_a_failing_observer_does_not_affect_the_response(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Trace] = []

    def broken(trace: Trace) -> None:
        raise ValueError("disk full")

    with caplog.at_level(logging.ERROR):
        assert ask(Traced(Recorder(), [broken, seen.append])).status == 200
    assert len(seen) == 1
    assert "a request observer failed" in caplog.text


def test_without_the_layer_the_trace_is_unused() -> None:
    assert trace_of({"type": "http", "method": "GET", "path": "/"}).id == ""
