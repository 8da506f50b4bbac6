"""A request through the relay: bytes untouched, cancellation all the way down."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from quantserve.serve.asgi import DisconnectOnCancel, HideInternals
from quantserve.serve.relay import Request, answer

from .asgi_client import request

REQUEST = Request("POST", "/v1/completions", b"a=1", [(b"content-type", b"application/json")], b'{"x": 1}')


async def collect(app: Any) -> list[Any]:
    return [part async for part in answer(app, REQUEST)]


def test_head_first_then_bytes() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["body"] == REQUEST.body
        assert scope["query_string"] == b"a=1"
        await send({"type": "http.response.start", "status": 418, "headers": [(b"x-a", b"1"), (b"x-a", b"2")]})
        for chunk in (b"a", b"", b"\x00\xff"):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b""})

    head, *body = asyncio.run(collect(app))
    assert head == (418, [(b"x-a", b"1"), (b"x-a", b"2")])
    assert body == [b"a", b"\x00\xff"]  # as they came, not gathered


def test_what_piled_up_travels_together() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})

    parts = asyncio.run(collect(app))
    assert b"".join(parts[1:]) == b"x" * 1000
    assert len(parts) == 2


def test_an_app_that_raises_raises_here() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        asyncio.run(collect(app))


class Patient:
    """Answers when its work is done, unless the client leaves: as vLLM does with non-streaming requests."""

    def __init__(self) -> None:
        self.outcome = ""

    async def work(self) -> None:
        try:
            await asyncio.sleep(60)
            self.outcome = "finished"
        except asyncio.CancelledError:
            self.outcome = "stopped"
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        work = asyncio.create_task(self.work())
        leaving = asyncio.create_task(receive())
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


def test_cancelled_request_disconnects_the_app() -> None:
    patient = Patient()

    async def main() -> None:
        task = asyncio.create_task(collect(DisconnectOnCancel(patient)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.05)

    asyncio.run(main())
    assert patient.outcome == "stopped"


def test_client_that_leaves_disconnects_the_app_as_before() -> None:
    async def streams(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"

    result = asyncio.run(request(DisconnectOnCancel(streams), "POST", "/", b"{}", leave_after=1))
    assert result.body == b"x"


@pytest.mark.parametrize("status", [500, 503, 504])
def test_internals_stay_inside(status: int) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error": {"message": "CUDA error in /opt/secret.py"}}'})

    result = asyncio.run(request(HideInternals(app), "GET", "/"))
    assert result.status == status
    assert "secret" not in result.error["message"]
