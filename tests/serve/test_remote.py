"""Requests to replicas over real connections: what dies, leaves or takes too long."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from quantserve.serve.asgi import Guard, read_body, request_scope
from quantserve.serve.remote import DRAINING, RemoteModel
from quantserve.serve.upstream import ReplicaLost

from .replica import Replica, pool_of, post, run, served, session_of, until, unused_port


def test_an_unreachable_replica_is_skipped() -> None:
    async def work() -> None:
        replica = Replica()
        async with served(replica) as port:
            app = RemoteModel(pool_of(dead=unused_port(), alive=port))
            answers = [await post(app) for _ in range(6)]
            assert [answer.status for answer in answers] == [200] * 6

    run(work)


def test_a_replica_that_dies_before_it_answers_has_a_successor() -> None:
    async def work() -> None:
        class Dying(Replica):
            async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
                await read_body(receive)
                self.requests.append(("", b"", {}))
                scope["extensions"] = {}
                session_of(send).abort()

        dying, replica = Dying(), Replica()
        async with served(dying) as a, served(replica) as b:
            app = RemoteModel(pool_of(dying=a, alive=b))
            answers = [await post(app) for _ in range(30)]  # which replica is asked first is left to chance
            assert [answer.status for answer in answers] == [200] * 30
            assert len(replica.requests) == 30
            assert len(dying.requests) >= 1

    run(work)


def test_a_request_that_breaks_the_app_is_tried_once_and_marks_no_replica_as_broken() -> None:
    async def work() -> None:
        class Poisonable(Replica):
            async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
                self.requests.append(("", await read_body(receive), {}))
                if b"poison" in self.requests[-1][1]:
                    raise RuntimeError("poison")
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b""})

        replicas = [Poisonable("a"), Poisonable("b"), Poisonable("c")]
        async with served(replicas[0]) as a, served(replicas[1]) as b, served(replicas[2]) as c:
            app = RemoteModel(pool_of(a=a, b=b, c=c))
            answer = await post(app, {"prompt": "poison"})
            assert (answer.status, answer.error["type"]) == (500, "server_error")
            assert sum(len(replica.requests) for replica in replicas) == 1
            assert app.pool.settled  # no replica is passed over
            assert (await post(app)).status == 200

    run(work)


def test_a_stream_that_breaks_ends_with_an_error_event() -> None:
    async def work() -> None:
        replica = Replica()
        replica.die_after = 1
        async with served(replica) as port:
            answer = await post(RemoteModel(pool_of(r=port)))
            assert answer.status == 200
            first, last = answer.body.decode().strip().split("\n\n")
            assert first == "data: 1"
            assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
            assert len(replica.requests) == 1

    run(work)


def test_half_a_document_breaks_the_connection() -> None:
    async def work() -> None:
        replica = Replica()
        replica.head = (200, [(b"content-type", b"application/json")])
        replica.die_after = 1
        async with served(replica) as port:
            with pytest.raises(ReplicaLost):  # Guard re-raises it, and the HTTP server closes the connection
                await post(RemoteModel(pool_of(r=port)))

    run(work)


def test_a_disconnected_client_cancels_its_request() -> None:
    async def work() -> None:
        replica = Replica()
        replica.hold = asyncio.Event()
        async with served(replica) as port:
            app = RemoteModel(pool_of(r=port))
            gone = asyncio.Event()
            messages = [{"type": "http.request", "body": b"{}", "more_body": False}]

            async def receive() -> Any:
                if messages:
                    return messages.pop()
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                raise AssertionError("nothing was answered")

            task = asyncio.create_task(Guard(app)(request_scope("POST", "/v1/completions"), receive, send))
            await until(lambda: replica.requests)
            gone.set()
            await task
            assert app.pool.ongoing == 0
            await until(lambda: replica.cancelled == 1)

    run(work)


def test_time_is_up() -> None:
    async def work() -> None:
        replica = Replica()
        replica.hold = asyncio.Event()
        async with served(replica) as port:
            answer = await post(RemoteModel(pool_of(r=port), timeout_s=0.5))
            assert (answer.status, answer.error["code"], answer.error["type"]) == (504, "timeout", "timeout_error")
            await until(lambda: replica.cancelled == len(replica.requests))

    run(work)


def test_a_draining_replica_hands_its_requests_to_another() -> None:
    async def work() -> None:
        draining, replica = Replica("d"), Replica()
        draining.head = (503, [(DRAINING, b"1"), (b"content-type", b"application/json")])
        async with served(draining) as a, served(replica) as b:
            app = RemoteModel(pool_of(d=a, r=b))
            assert [(await post(app)).status for _ in range(6)] == [200] * 6
            assert len(draining.requests) <= 1

    run(work)


def test_a_request_waits_for_the_successor_of_a_draining_replica() -> None:
    async def work() -> None:
        draining, replica = Replica("d"), Replica()
        draining.head = (503, [(DRAINING, b"1"), (b"content-type", b"application/json")])
        async with served(draining) as a, served(replica) as b:
            app = RemoteModel(pool_of(d=a))
            early = [asyncio.create_task(post(app)) for _ in range(3)]  # the first is refused by the replica itself
            await until(lambda: len(app.pool.waiting) == 3)
            app.pool.update([{"id": "r", "host": "127.0.0.1", "port": b}])
            assert [answer.status for answer in await asyncio.gather(*early)] == [200] * 3
            app.pool.update([{"id": "r", "host": "127.0.0.1", "port": b, "state": "draining"}])
            late = asyncio.create_task(post(app))
            await until(lambda: app.pool.waiting)
            app.pool.update([])
            assert ((await late).status, (await post(app)).status) == (503, 503)

    run(work)
