"""One API key cannot fill the queue."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quantserve.serve.gateway.middleware.api_keys import ApiKeys, KeySet, _digests
from quantserve.serve.gateway.middleware.key_limit import KeyLimit
from quantserve.serve.gateway.middleware.limits import Policy, layers

from .asgi_client import Answer, request

KEYS = ("key-number-one", "key-number-two")


class Slow:
    """An upstream that answers when told."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.entered = asyncio.Semaphore(0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.entered.release()
        if scope["method"] == "POST":
            await self.go.wait()
        await Response("{}")(scope, receive, send)


async def ask(app: Any, key: str | None, method: str = "POST") -> Answer:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return await request(app, method, "/v1/completions", {} if method == "POST" else None, headers=headers)


def test_requests_of_one_key_are_limited() -> None:
    async def work() -> None:
        slow = Slow()
        limit = KeyLimit(slow, 2)
        app = ApiKeys(limit, KeySet(fixed=tuple(_digests(KEYS))))
        running = [asyncio.create_task(ask(app, KEYS[0])) for _ in range(2)]
        for _ in running:
            await slow.entered.acquire()
        refused = await ask(app, KEYS[0])
        assert (refused.status, refused.error["code"], refused.error["type"]) == (429, "key_limit", "rate_limit_error")
        assert refused.headers["retry-after"] == "1"
        assert "2 requests in progress" in refused.error["message"]
        assert (await ask(app, KEYS[0], "GET")).status == 200  # no work of an engine
        other = asyncio.create_task(ask(app, KEYS[1]))
        await slow.entered.acquire()
        await slow.entered.acquire()
        running[0].cancel()  # the client left
        await asyncio.gather(running[0], return_exceptions=True)
        running.append(asyncio.create_task(ask(app, KEYS[0])))
        await slow.entered.acquire()
        assert (await ask(app, KEYS[0])).status == 429
        slow.go.set()
        assert [answer.status for answer in await asyncio.gather(*running[1:], other)] == [200] * 3
        assert not limit.ongoing
        assert (await ask(app, KEYS[0])).status == 200

    asyncio.run(work())


def test_without_a_limit_or_without_keys_nothing_is_counted() -> None:
    async def work() -> None:
        for app in (ApiKeys(KeyLimit(Slow(), None), KeySet(fixed=tuple(_digests(KEYS)))), KeyLimit(Slow(), 1)):
            slow = app.app if isinstance(app, KeyLimit) else app.app.app  # type: ignore[attr-defined]
            running = [asyncio.create_task(ask(app, KEYS[0])) for _ in range(5)]
            for _ in running:
                await slow.entered.acquire()  # type: ignore[attr-defined]
            slow.go.set()  # type: ignore[attr-defined]
            assert [answer.status for answer in await asyncio.gather(*running)] == [200] * 5

    asyncio.run(work())


def test_the_limit_is_the_policys() -> None:
    async def work() -> None:
        slow = Slow()
        policy = Policy(max_requests_per_key=1, keys=KeySet(fixed=tuple(_digests(KEYS))), access_log="off")
        app = layers(slow, policy)
        running = asyncio.create_task(ask(app, KEYS[0]))
        await slow.entered.acquire()
        assert [(await ask(app, key)).status for key in (KEYS[0], None)] == [429, 401]
        slow.go.set()
        assert (await running).status == 200

    asyncio.run(work())
