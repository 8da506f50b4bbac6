"""How long a request body stays in the gateway's memory."""

from __future__ import annotations

import asyncio

from starlette.types import Message

from quantserve.serve.asgi import request_scope
from quantserve.serve.gateway.middleware.limits import Limits, Policy
from quantserve.serve.gateway.upstreams.proxy import RemoteModel

from .replica import Replica, pool_of, run, served, until

PROMPT = b'{"prompt": "' + b"a-rare-text " * 20_000 + b'"}'


def test_a_body_does_not_outlive_the_beginning_of_the_response() -> None:
    async def work() -> None:
        replica = Replica()
        replica.hold = asyncio.Event()
        async with served(replica) as port:
            limits = Limits(RemoteModel(pool_of(a=port)), Policy())
            received: list[Message] = []
            begun, go_on = asyncio.Event(), asyncio.Event()
            pieces = [PROMPT[: 1 << 17], PROMPT[1 << 17 :]]

            async def receive() -> Message:
                if pieces:
                    return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
                await asyncio.Event().wait()
                raise AssertionError

            async def send(message: Message) -> None:
                received.append(message)
                if message.get("body"):
                    begun.set()
                    await go_on.wait()

            scope = request_scope("POST", "/v1/completions", [(b"content-type", b"application/json")])
            task = asyncio.create_task(limits(scope, receive, send))
            await until(lambda: replica.requests)
            assert limits.buffers.held == len(PROMPT)  # it may have to move to another replica
            replica.hold.set()
            await begun.wait()
            assert limits.buffers.held == 0
            go_on.set()
            await task
            assert received[-1] == {"type": "http.response.body", "body": b"", "more_body": False}

    run(work)


def test_a_refused_request_releases_its_body() -> None:
    async def work() -> None:
        limits = Limits(RemoteModel(pool_of()), Policy())

        async def receive() -> Message:
            return {"type": "http.request", "body": PROMPT, "more_body": False}

        async def send(message: Message) -> None:
            raise AssertionError

        scope = request_scope("POST", "/v1/completions", [(b"content-type", b"application/json")])
        answers = await asyncio.gather(limits(scope, receive, send), return_exceptions=True)
        assert str(answers[0])
        assert limits.buffers.held == 0

    run(work)
