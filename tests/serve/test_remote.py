"""Requests to replicas over real connections: what dies, leaves or takes too long."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from quantserve.serve.asgi import Guard, Incomplete, read_body, replay, request_scope
from quantserve.serve.gateway.upstreams.pool import Limits, Pool
from quantserve.serve.gateway.upstreams.proxy import RemoteModel
from quantserve.serve.headers import DRAINING_HEADER
from quantserve.serve.transport.client import ReplicaLost

from .asgi_client import Answer, request
from .replica import Replica, pool_of, post, run, served, session_of, until, unused_port


@contextlib.contextmanager
def chosen(pool: Pool, name: str) -> Iterator[None]:
    """The replica is the least loaded one, and gets the next request."""
    others = [replica for replica in pool.replicas.values() if replica.id != name]
    for replica in others:
        replica.ongoing += 1
    yield
    for replica in others:
        replica.ongoing -= 1


def test_an_unreachable_replica_is_skipped() -> None:
    async def work() -> None:
        replica = Replica()
        async with served(replica) as port:
            app = RemoteModel(pool_of(dead=unused_port(), alive=port))
            with chosen(app.pool, "dead"):
                assert (await post(app)).status == 200
            assert app.pool.replicas["dead"].state == "broken"
            with chosen(app.pool, "dead"):  # although it has fewer requests
                assert (await post(app)).status == 200
            assert len(replica.requests) == 2

    run(work)


def test_a_replica_that_can_be_reached_again_gets_the_queued_requests_at_once() -> None:
    async def work() -> None:
        busy, back = Replica("busy"), Replica("back")
        busy.hold = back.hold = asyncio.Event()
        async with served(busy) as a, served(back) as b:
            app = RemoteModel(pool_of(Limits(ongoing=1), busy=a, back=b))
            with contextlib.suppress(ReplicaLost):
                async with app.pool.slot():
                    raise ReplicaLost("as if its connection was lost")
            requests = [asyncio.create_task(post(app)) for _ in range(2)]
            await until(lambda: app.pool.waiting)
            await until(lambda: busy.requests and back.requests)  # within a second; the first one has not ended
            assert not app.pool.waiting
            busy.hold.set()
            assert [answer.status for answer in await asyncio.gather(*requests)] == [200, 200]

    run(work)


def test_a_retry_is_not_refused_for_a_full_queue() -> None:
    async def work() -> None:
        replica, order = Replica(), []
        async with served(replica) as port:
            app = RemoteModel(pool_of(Limits(ongoing=1, queued=1), dead=unused_port(), alive=port))
            with chosen(app.pool, "dead"):  # the other one is full
                new = asyncio.create_task(post(app, {"prompt": "new"}))
                late = asyncio.create_task(post(app, {"prompt": "late"}))
                await until(lambda: len(app.pool.waiting) == 2)
                assert (await post(app)).error["code"] == "queue_full"
            async with app.pool.slot(avoid=frozenset({"dead"}), retry=True):  # its end wakes the others
                pass
            for task in (new, late):
                order.append((await task).status)
            assert order == [200, 200]

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
            with chosen(app.pool, "dying"):
                assert (await post(app)).status == 200
            assert (len(dying.requests), len(replica.requests)) == (1, 1)

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
            with pytest.raises(Incomplete):  # Guard re-raises it, and the HTTP server closes the connection
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
        draining.head = (503, [(DRAINING_HEADER, b"1"), (b"content-type", b"application/json")])
        async with served(draining) as a, served(replica) as b:
            app = RemoteModel(pool_of(d=a, r=b))
            for _ in range(2):
                with chosen(app.pool, "d"):
                    assert (await post(app)).status == 200
                app.pool.update(
                    [{"id": "d", "host": "127.0.0.1", "port": a}, {"id": "r", "host": "127.0.0.1", "port": b}]
                )
            assert (len(draining.requests), len(replica.requests)) == (1, 2)  # an older look-up does not revoke it

    run(work)


def test_draining_replicas_use_up_no_attempts() -> None:
    async def work() -> None:
        draining, replica = Replica("d"), Replica()
        draining.head = (503, [(DRAINING_HEADER, b"1"), (b"content-type", b"application/json")])
        async with contextlib.AsyncExitStack() as stack:
            ports = {f"d{number}": await stack.enter_async_context(served(draining)) for number in range(5)}
            port = await stack.enter_async_context(served(replica))
            app = RemoteModel(pool_of(None, **ports, r=port), attempts=1)
            app.pool.replicas["r"].ongoing += 1  # it is asked last
            assert (await post(app)).status == 200
            assert (len(draining.requests), len(replica.requests)) == (5, 1)

    run(work)


def test_a_request_waits_for_the_successor_of_a_draining_replica() -> None:
    async def work() -> None:
        draining, replica = Replica("d"), Replica()
        draining.head = (503, [(DRAINING_HEADER, b"1"), (b"content-type", b"application/json")])
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


def test_the_body_is_dropped_when_no_retry_can_need_it() -> None:
    dropped = asyncio.Event()

    class Body(bytes):
        def __del__(self) -> None:
            dropped.set()

    async def work() -> None:
        async def slow(scope: Scope, receive: Receive, send: Send) -> None:
            await read_body(receive)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"1", "more_body": True})
            await dropped.wait()
            await send({"type": "http.response.body", "body": b"2"})

        messages = [{"type": "http.request", "body": Body(b"{}"), "more_body": False}]
        sent: list[bytes] = []

        async def receive() -> Any:
            if messages:
                return messages.pop()
            return await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))

        async with served(slow) as port:
            await RemoteModel(pool_of(r=port))(request_scope("POST", "/v1/completions"), receive, send)
        assert b"".join(sent) == b"12"

    run(work)


@pytest.mark.parametrize("location", [b"http://gateway/v1/models", b"/v1/models", b"//elsewhere/"])
def test_a_redirect_of_the_replica_does_not_leave_the_gateway(location: bytes) -> None:
    async def work() -> None:
        replica = Replica()
        replica.head = (307, [(b"location", location)])
        async with served(replica) as port:
            for method in ("GET", "POST"):
                answer = await request(RemoteModel(pool_of(r=port)), method, "/v1/models/")
                assert (answer.status, answer.error["code"]) == (404, "unknown_url")
                assert "location" not in answer.headers

    run(work)


def test_a_request_that_the_wire_cannot_carry_is_the_clients_mistake() -> None:
    async def work() -> None:
        async with served(Replica()) as port:
            app = RemoteModel(pool_of(r=port))
            for answer in (
                await request(app, "X" * 300, "/v1/models"),
                await request(app, "GET", "/" + "\u2713" * 500_000),
                await request(app, "GET", "/", headers={"x": "y" * 3_000_000}),
            ):
                assert (answer.status, answer.error["code"]) == (400, "invalid_request")
            assert app.pool.settled

    run(work)


@pytest.mark.parametrize("header", ["x-session-id", "x_session_id"])
def test_a_session_stays_on_its_replica(header: str) -> None:
    async def work() -> None:
        replicas = [Replica(name) for name in "abc"]
        async with served(replicas[0]) as a, served(replicas[1]) as b, served(replicas[2]) as c:
            app = RemoteModel(pool_of(Limits(affinity="session"), a=a, b=b, c=c))
            for _ in range(12):
                assert (await post(app, headers={header: "s1"})).status == 200
            assert sorted(len(replica.requests) for replica in replicas) == [0, 0, 12]

    run(work)


INTERNAL = "Internal error. The server's log has the details."
BROKEN: dict[str, tuple[list[bytes], dict[str, Any]]] = {
    "/v1/chat/completions": ([b"data: {}\n\n"], {"type": "server_error"}),
    "/v1/messages": (
        [b"event: ping\ndata: {}\n\n"],
        {"type": "error", "error": {"type": "api_error", "message": INTERNAL}},
    ),
    "/v1/responses": (
        [b'event: x\ndata: {"sequence_number":7}\n\n'],
        {"type": "error", "code": "server_error", "param": None, "sequence_number": 8,
         "message": INTERNAL},
    ),
}  # fmt: skip


@pytest.mark.parametrize("path", BROKEN)
@pytest.mark.parametrize("cut", [0, 5])
def test_a_broken_stream_ends_with_the_error_event_of_its_api(path: str, cut: int) -> None:
    chunks, expected = BROKEN[path]

    async def work() -> None:
        replica = Replica()
        replica.chunks = [chunks[0] + chunks[0][:cut]]  # in the middle of an event, too
        replica.die_after = 1
        async with served(replica) as port:
            answer = await post(RemoteModel(pool_of(r=port)), path=path)
        last = answer.body.decode().rstrip("\n").split("\n\n")[-1].split("\n")
        event = json.loads(last[-1].removeprefix("data: "))
        if path == "/v1/chat/completions":
            assert len(last) == 1
            assert event["error"]["type"] == expected["type"]
        else:
            assert last[0] == "event: error"
            assert event == expected

    run(work)


def test_at_the_end_of_the_drain_timeout_requests_end_with_an_error() -> None:
    async def work() -> None:
        streaming, held, begun = Replica(), Replica(), Answer()
        held.hold = asyncio.Event()

        async def stream(scope: Scope, receive: Receive, send: Send) -> None:
            await read_body(receive)
            await send({"type": "http.response.start", "status": 200, "headers": streaming.head[1]})
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
            await receive()
            streaming.cancelled += 1

        async with served(stream) as a, served(held) as b:
            first, second = RemoteModel(pool_of(r=a)), RemoteModel(pool_of(Limits(ongoing=1), r=b))
            sent = (post(first, answer=begun), post(second), post(second))
            requests = [asyncio.create_task(request) for request in sent]
            await until(lambda: held.requests and second.pool.waiting and begun.chunks)
            for app in (first, second):
                app.pool.fail_running()
            answers = await asyncio.gather(*requests)
            assert [answer.status for answer in answers] == [200, 503, 503]
            assert answers[0].body.startswith(b"data: 1\n\ndata: {")
            assert b"shutting down" in answers[0].body
            assert [answer.error["code"] for answer in answers[1:]] == ["shutdown", "shutdown"]
            await until(lambda: streaming.cancelled == held.cancelled == 1)
            assert (first.pool.ongoing, second.pool.ongoing, len(second.pool.running)) == (0, 0, 0)

    run(work)


def test_a_shutdown_a_moment_after_the_end_of_a_stream_adds_nothing() -> None:
    async def work() -> None:
        replica, sent = Replica(), []
        async with served(replica) as port:
            app = RemoteModel(pool_of(only=port))

            async def send(message: Message) -> None:
                sent.append(message)
                if message["type"] == "http.response.body" and not message["more_body"]:
                    asyncio.get_running_loop().call_soon(app.pool.fail_running)

            async def stay() -> Message:
                await asyncio.Event().wait()
                raise AssertionError

            await app(request_scope("POST", "/v1/completions"), replay(b"{}", stay), send)
        assert [message.get("more_body") for message in sent[1:]].count(False) == 1
        assert b"".join(message["body"] for message in sent[1:]) == b"".join(replica.chunks)

    run(work)


def test_a_receive_channel_that_fails_is_a_client_that_left(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        replica = Replica()
        replica.hold = asyncio.Event()
        async with served(replica) as port:
            app = RemoteModel(pool_of(r=port))
            messages = [{"type": "http.request", "body": b"{}", "more_body": False}]

            async def receive() -> Any:
                if messages:
                    return messages.pop()
                await until(lambda: replica.requests)
                raise RuntimeError("the connection is in an odd state")

            async def send(message: Any) -> None:
                raise AssertionError("nothing was answered")

            await app(request_scope("POST", "/v1/completions"), receive, send)
            await until(lambda: replica.cancelled == 1)
            assert app.pool.ongoing == 0

    run(work)
    assert "odd state" in caplog.text
