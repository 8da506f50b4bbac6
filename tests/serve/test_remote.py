"""Requests to replicas over real connections: admission, choice, retries, faults."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send

from quantserve.serve.asgi import Guard, read_body, request_scope
from quantserve.serve.listener import Listener
from quantserve.serve.remote import DRAINING, RemoteModel, affinity_key
from quantserve.serve.replicas import Limits, Pool
from quantserve.serve.upstream import ReplicaLost, Upstream
from quantserve.serve.wire import Frames, Kind, frame, pack_head, pack_request, unpack_head

from .asgi_client import Answer, request

TOKEN = "t0ken"
SYSTEM = {"role": "system", "content": "be kind"}


@contextlib.asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[int]:
    """A replica in this loop; gives its port."""
    listening = socket.create_server(("127.0.0.1", 0))
    listener = Listener(app, TOKEN)
    await listener.start(listening)
    try:
        yield listening.getsockname()[1]
    finally:
        listener.close()


class Replica:
    """Answers as it is told; remembers what it was asked."""

    def __init__(self, name: str = "r") -> None:
        self.name = name
        self.requests: list[tuple[str, bytes, dict[bytes, bytes]]] = []
        self.hold: asyncio.Event | None = None
        self.chunks = [b"data: 1\n\n", b"data: 2\n\n"]
        self.head = (200, [(b"content-type", b"text/event-stream"), (b"x-a", b"1"), (b"x-a", b"2")])
        self.die_after: int | None = None
        self.cancelled = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(receive)
        target = scope["raw_path"].decode() + ("?" + scope["query_string"].decode() if scope["query_string"] else "")
        self.requests.append((target, body, dict(scope["headers"])))
        if self.hold is not None:
            leaving = asyncio.create_task(receive())
            held = asyncio.create_task(self.hold.wait())
            await asyncio.wait({leaving, held}, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                self.cancelled += 1
                held.cancel()
                return
            leaving.cancel()
        if self.die_after == 0:
            raise RuntimeError("dead")
        await send({"type": "http.response.start", "status": self.head[0], "headers": self.head[1]})
        for index, chunk in enumerate(self.chunks, 1):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await asyncio.sleep(0.01)
            if index == self.die_after:
                raise ConnectionError("dead")
        await send({"type": "http.response.body", "body": b""})


def session_of(send: Send) -> Any:
    """The connection that an app's answer goes to."""
    return send.__self__._session  # type: ignore[attr-defined]


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(20):
            return await work()

    return uvloop.run(bounded())  # as the gateway and the replicas


def pool_of(limits: Limits | None = None, **ports: int) -> Pool:
    pool = Pool("m", limits or Limits(), TOKEN)
    pool.update([{"id": name, "host": "127.0.0.1", "port": port} for name, port in ports.items()])
    return pool


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def post(app: ASGIApp, body: object = None, path: str = "/v1/completions", **kwargs: Any) -> Answer:
    return await request(app, "POST", path, body if body is not None else {"prompt": "x"}, **kwargs)


def test_bytes_pass_untouched_in_both_directions() -> None:
    async def work() -> None:
        replica = Replica()
        replica.chunks = [b"\x00\xff", b"data: \xc3\xa9\n\n", b"x" * 300_000]
        async with served(replica) as port:
            app = RemoteModel(pool_of(r=port))
            body = json.dumps({"prompt": "é" * 200_000}, ensure_ascii=False).encode()
            answer = await post(app, body, headers={"authorization": "Bearer secret", "x-request-id": "7"})
            assert (answer.status, answer.body) == (200, b"".join(replica.chunks))
            target, received, headers = replica.requests[0]
            assert (target, received) == ("/v1/completions", body)
            assert headers[b"x-request-id"] == b"7"
            assert b"authorization" not in headers

    run(work)


def test_path_and_query_arrive_as_sent() -> None:
    async def work() -> None:
        replica = Replica()
        async with served(replica) as port:
            scope = request_scope("GET", "/v1/a b/é", [], b"q=%20&r=1")
            sent: list[Any] = []
            messages = [{"type": "http.request", "body": b"", "more_body": False}]

            async def receive() -> Any:
                if messages:
                    return messages.pop()
                await asyncio.sleep(60)
                raise AssertionError

            async def send(message: Any) -> None:
                sent.append(message)

            await RemoteModel(pool_of(r=port))(scope, receive, send)
            assert replica.requests[0][0] == "/v1/a%20b/%C3%A9?q=%20&r=1"

    run(work)


def test_one_connection_is_kept_for_all_and_a_closed_one_is_replaced() -> None:
    async def work() -> None:
        replica = Replica()
        sessions: set[Any] = set()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            sessions.add(session_of(send))
            await replica(scope, receive, send)

        pool = Pool("m", Limits(), TOKEN)
        async with served(app) as port:
            pool.update([{"id": "r", "host": "127.0.0.1", "port": port}])
            answers = await asyncio.gather(*(post(RemoteModel(pool)) for _ in range(20)))
            assert [answer.body for answer in answers] == [b"".join(replica.chunks)] * 20
            assert (await post(RemoteModel(pool))).status == 200
            assert len(sessions) == 1
        upstream = pool.replicas["r"].upstream
        async with served(replica) as port:  # the same replica object, another server: the kept connection is dead
            upstream.port = port
            assert (await post(RemoteModel(pool))).status == 200

    run(work)


def test_the_answer_to_head_is_whole_without_a_body() -> None:
    async def work() -> None:
        replica = Replica()
        replica.head = (405, [(b"content-length", b"18"), (b"content-type", b"text/event-stream")])
        async with served(replica) as port:
            pool = pool_of(r=port)
            for path in ("/version", "/load"):
                answer = await request(RemoteModel(pool), "HEAD", path)
                assert (answer.status, answer.headers["content-length"], answer.body) == (405, "18", b"")
            replica.head = (200, [])
            assert (await request(RemoteModel(pool), "GET", "/version")).body == b"".join(replica.chunks)

    run(work)


def test_a_full_model_refuses_at_once_and_in_order() -> None:
    async def work() -> None:
        replica = Replica()
        replica.hold = asyncio.Event()
        async with served(replica) as port:
            app = RemoteModel(pool_of(Limits(ongoing=2, queued=1), r=port))
            begun = [asyncio.create_task(post(app)) for _ in range(3)]
            await asyncio.sleep(0.1)
            assert len(replica.requests) == 2
            began = time.perf_counter()
            refused = await post(app)
            assert time.perf_counter() - began < 0.05
            assert (refused.status, refused.error["code"], refused.error["type"]) == (
                429,
                "queue_full",
                "rate_limit_error",
            )
            assert int(refused.headers["retry-after"]) >= 1
            assert "2 requests in progress and 1 waiting" in refused.error["message"]
            replica.hold.set()
            assert [answer.status for answer in await asyncio.gather(*begun)] == [200, 200, 200]
            assert (await post(app)).status == 200
            assert app.pool.ongoing == 0

    run(work)


def test_a_full_model_still_tells_its_metrics() -> None:
    async def work() -> None:
        async with served(Replica()) as port:
            pool = pool_of(Limits(ongoing=1, queued=0), r=port)
            async with pool.slot():
                assert (await post(RemoteModel(pool))).status == 429
                assert (await request(RemoteModel(pool), "GET", "/metrics")).status == 200
                assert pool.ongoing == 1
        pool.update([])
        assert (await request(RemoteModel(pool), "GET", "/metrics")).status == 503

    run(work)


def test_waiting_ends() -> None:
    async def work() -> None:
        replica = Replica()
        replica.hold = asyncio.Event()
        async with served(replica) as port:
            app = RemoteModel(pool_of(Limits(ongoing=1, queued=5, queue_s=0.2), r=port))
            first = asyncio.create_task(post(app))
            await asyncio.sleep(0.05)
            refused = await post(app)
            assert (refused.status, refused.error["code"]) == (429, "queue_timeout")
            assert not app.pool.waiting
            replica.hold.set()
            assert (await first).status == 200

    run(work)


def test_busy_status_and_retry_are_the_configs() -> None:
    async def work() -> None:
        replica = Replica()
        replica.hold = asyncio.Event()
        async with served(replica) as port:
            app = RemoteModel(pool_of(Limits(ongoing=1, queued=0, busy_status=503, retry_after_s=7), r=port))
            first = asyncio.create_task(post(app))
            await asyncio.sleep(0.05)
            refused = await post(app)
            assert (refused.status, refused.headers["retry-after"]) == (503, "7")
            replica.hold.set()
            await first

    run(work)


def test_the_least_loaded_replica_is_next() -> None:
    async def work() -> None:
        replicas = [Replica("a"), Replica("b")]
        for replica in replicas:
            replica.hold = asyncio.Event()
        async with served(replicas[0]) as a, served(replicas[1]) as b:
            app = RemoteModel(pool_of(a=a, b=b))
            tasks = []
            for _ in range(20):
                tasks.append(asyncio.create_task(post(app)))
                await asyncio.sleep(0.01)
            assert [len(replica.requests) for replica in replicas] == [10, 10]
            for replica in replicas:
                assert replica.hold is not None
                replica.hold.set()
            await asyncio.gather(*tasks)

    run(work)


@pytest.mark.parametrize(
    ("affinity", "bodies", "together"),
    [
        ("session", [{"user": "u", "prompt": str(i)} for i in range(8)], True),
        ("prefix", [{"prompt": "x" * 600 + str(i)} for i in range(8)], True),
        ("prefix", [{"messages": [SYSTEM, {"role": "user", "content": str(i)}]} for i in range(8)], True),
        ("none", [{"user": "u"}] * 8, False),
    ],
)  # fmt: skip
def test_affinity(affinity: str, bodies: list[dict[str, Any]], together: bool) -> None:
    async def work() -> None:
        replicas = [Replica("a"), Replica("b"), Replica("c")]
        async with served(replicas[0]) as a, served(replicas[1]) as b, served(replicas[2]) as c:
            app = RemoteModel(pool_of(Limits(affinity=affinity), a=a, b=b, c=c))
            for body in bodies:
                assert (await post(app, body)).status == 200
            counts = sorted(len(replica.requests) for replica in replicas)
            assert (counts == [0, 0, 8]) is together

    run(work)


def test_affinity_yields_to_load() -> None:
    async def work() -> None:
        replicas = [Replica("a"), Replica("b")]
        for replica in replicas:
            replica.hold = asyncio.Event()
        async with served(replicas[0]) as a, served(replicas[1]) as b:
            app = RemoteModel(pool_of(Limits(affinity="session"), a=a, b=b))
            tasks = [asyncio.create_task(post(app, {"user": "u"})) for _ in range(20)]
            await asyncio.sleep(0.2)
            assert min(len(replica.requests) for replica in replicas) >= 6
            for replica in replicas:
                assert replica.hold is not None
                replica.hold.set()
            await asyncio.gather(*tasks)

    run(work)


def test_affinity_key_needs_text() -> None:
    assert affinity_key({"user": 5, "prompt": [1, 2]}, "prefix") is None
    assert affinity_key({"messages": []}, "prefix") is None
    assert affinity_key({"prompt": "a"}, "session") is None


def test_a_replica_that_is_gone_is_passed_over() -> None:
    async def work() -> None:
        replica = Replica()
        async with served(replica) as port:
            app = RemoteModel(pool_of(dead=unused_port(), alive=port))
            answers = [await post(app) for _ in range(6)]
            assert [answer.status for answer in answers] == [200] * 6

    run(work)


def test_without_a_replica_the_answer_is_503_at_once() -> None:
    async def work() -> None:
        for pool in (pool_of(), pool_of(dead=unused_port())):
            began = time.perf_counter()
            answer = await post(RemoteModel(pool))
            assert (answer.status, answer.error["code"]) == (503, "model_unavailable")
            assert answer.headers["retry-after"] == "5"
            assert time.perf_counter() - began < 1

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
            answers = [await post(app) for _ in range(4)]
            assert [answer.status for answer in answers] == [200] * 4
            assert len(replica.requests) == 4
            assert len(dying.requests) >= 1

    run(work)


def test_an_app_that_fails_before_it_answers_is_asked_once() -> None:
    async def work() -> None:
        replica = Replica()
        async with served(replica) as port:
            pool = pool_of(r=port)
            assert (await post(RemoteModel(pool))).status == 200
            replica.die_after = 0
            assert (await post(RemoteModel(pool))).status == 503
            assert len(replica.requests) == 2
            replica.die_after = None
            pool.replicas["r"].broken_until = 0
            assert (await post(RemoteModel(pool))).status == 200  # the connection is still good

    run(work)


def test_strangers_are_not_answered() -> None:
    async def work() -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            raise AssertionError("a stranger got in")

        hello, ask = frame(Kind.HELLO, 0, b"wrong"), frame(Kind.OPEN, 1, pack_request("GET", b"/", [], b""))
        async with served(app) as port:
            for said in (b"GET /health HTTP/1.1\r\n\r\n", hello + ask, ask, frame(Kind.HELLO, 0), b"\xff" * 4096):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(said)
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
                writer.close()
            with pytest.raises(ReplicaLost):
                await Upstream("127.0.0.1", port, "another").request("GET", b"/health")

    run(work)


def test_a_slow_client_does_not_slow_the_others() -> None:
    async def work() -> None:
        replica = Replica()
        replica.chunks = [b"x" * 65536] * 40
        async with served(replica) as port:
            upstream = Upstream("127.0.0.1", port, TOKEN)
            slow = await upstream.request("POST", b"/", (), b"{}")
            await asyncio.sleep(0.2)
            quick = await upstream.request("POST", b"/", (), b"{}")
            size = 0
            while data := await quick.read():
                size += len(data)
            assert size == 40 * 65536
            assert slow._waiting < 1 << 20
            size = 0
            while data := await slow.read():
                size += len(data)
            assert size == 40 * 65536

    run(work)


@pytest.mark.parametrize("size", [1, 7, 9, 64, 1 << 20])
def test_frames_are_found_however_they_are_split(size: int) -> None:
    sent = [(Kind.OPEN, 1, b""), (Kind.DATA, 2**32 - 1, b"\x00" * 300), (Kind.END, 3, b"e" * 9), (Kind.DATA, 4, b"x")]
    data = b"".join(frame(*one) for one in sent)
    frames = Frames()
    found = [one for at in range(0, len(data), size) for one in frames.feed(data[at : at + size])]
    assert found == sent
    assert frames.wanted == len(frame(Kind.END, 1))


def test_a_head_cannot_smuggle_a_line() -> None:
    first, headers = unpack_head(pack_head(b"200", [(b"a", b"b:c"), (b"x", b"1\nset-cookie:evil"), (b"e", b"")]))
    assert (first, headers) == (b"200", [(b"a", b"b:c"), (b"e", b"")])


def test_a_stream_that_breaks_ends_with_an_error_event() -> None:
    async def work() -> None:
        replica = Replica()
        replica.die_after = 1
        async with served(replica) as port:
            answer = await post(RemoteModel(pool_of(r=port)))
            assert answer.status == 200
            first, last = answer.body.decode().strip().split("\n\n")
            assert first == "data: 1"
            assert json.loads(last.removeprefix("data: "))["error"]["type"] == "service_unavailable_error"
            assert len(replica.requests) == 1

    run(work)


def test_half_a_document_breaks_the_connection() -> None:
    async def work() -> None:
        replica = Replica()
        replica.head = (200, [(b"content-type", b"application/json")])
        replica.die_after = 1
        async with served(replica) as port:
            with pytest.raises(ReplicaLost):
                await post(RemoteModel(pool_of(r=port)))

    run(work)


def test_a_client_that_leaves_cancels_its_request() -> None:
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
            await asyncio.sleep(0.1)
            gone.set()
            await task
            await asyncio.sleep(0.1)
            assert (replica.cancelled, app.pool.ongoing) == (1, 0)

    run(work)


def test_a_client_that_leaves_the_queue_frees_its_place() -> None:
    async def work() -> None:
        replica = Replica()
        replica.hold = asyncio.Event()
        async with served(replica) as port:
            app = RemoteModel(pool_of(Limits(ongoing=1, queued=1), r=port))
            first = asyncio.create_task(post(app))
            await asyncio.sleep(0.05)
            second = asyncio.create_task(post(app))
            await asyncio.sleep(0.05)
            second.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await second
            assert not app.pool.waiting
            third = asyncio.create_task(post(app))
            await asyncio.sleep(0.05)
            replica.hold.set()
            assert [(await task).status for task in (first, third)] == [200, 200]

    run(work)


def test_time_is_up() -> None:
    async def work() -> None:
        replica = Replica()
        replica.hold = asyncio.Event()
        async with served(replica) as port:
            answer = await post(RemoteModel(pool_of(r=port), timeout_s=0.1))
            assert (answer.status, answer.error["code"], answer.error["type"]) == (504, "timeout", "timeout_error")
            await asyncio.sleep(0.05)
            assert replica.cancelled == 1

    run(work)


def test_a_draining_replica_hands_its_requests_to_another() -> None:
    async def work() -> None:
        draining, replica = Replica("d"), Replica()
        draining.head = (503, [(DRAINING, b"1"), (b"content-type", b"application/json")])
        async with served(draining) as a, served(replica) as b:
            app = RemoteModel(pool_of(d=a, r=b))
            assert [(await post(app)).status for _ in range(6)] == [200] * 6
            assert len(draining.requests) <= 1
            app.pool.update([{"id": "d", "host": "127.0.0.1", "port": a, "draining": True}])
            assert (await post(app)).status == 503

    run(work)


def test_a_model_at_zero_is_wanted_and_its_request_waits() -> None:
    async def work() -> None:
        replica = Replica()
        async with served(replica) as port:
            pool = pool_of(Limits(wakes=True))
            waiting = asyncio.create_task(post(RemoteModel(pool)))
            await asyncio.sleep(0.05)
            assert pool.wanted
            pool.update([{"id": "r", "host": "127.0.0.1", "port": port}])
            assert (await waiting).status == 200
            assert not pool.wanted

    run(work)


def test_last_replica_gone_tells_those_who_wait() -> None:
    async def work() -> None:
        replica = Replica()
        replica.hold = asyncio.Event()
        async with served(replica) as port:
            pool = pool_of(Limits(ongoing=1, queued=5), r=port)
            first = asyncio.create_task(post(RemoteModel(pool)))
            await asyncio.sleep(0.05)
            second = asyncio.create_task(post(RemoteModel(pool)))
            await asyncio.sleep(0.05)
            pool.update([])
            assert (await second).status == 503
            replica.hold.set()
            assert (await first).status == 200  # what runs may finish

    run(work)


def test_slow_client_slows_the_replica() -> None:
    async def work() -> None:
        produced = 0

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal produced
            await read_body(receive)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(400):
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                produced += 1
            await send({"type": "http.response.body", "body": b""})

        async with served(app) as port:
            response = await Upstream("127.0.0.1", port, TOKEN).request("POST", b"/", (), b"{}")
            await asyncio.sleep(0.5)
            assert produced < 200  # 25 MB in all; what is not read stays in the sockets and one buffer
            size = 0
            while data := await response.read():
                size += len(data)
            response.close()
            assert size == 400 * 65536

    run(work)


def test_a_replica_that_leaves_the_list_ends_its_answers_and_then_its_connection() -> None:
    async def work() -> None:
        replica = Replica()
        replica.hold = asyncio.Event()
        sessions: set[Any] = set()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            sessions.add(session_of(send))
            await replica(scope, receive, send)

        async with served(app) as port:
            pool = pool_of(r=port)
            asked = asyncio.create_task(post(RemoteModel(pool)))
            await asyncio.sleep(0.1)
            pool.update([])
            replica.hold.set()
            assert (await asked).status == 200
            await asyncio.sleep(0.1)
            (session,) = sessions
            assert session._transport.is_closing()

    run(work)


def test_what_was_answered_arrives_though_the_replica_closes() -> None:
    async def work() -> None:
        listening = socket.create_server(("127.0.0.1", 0))

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await read_body(receive)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x" * 300_000})
            listener.close()  # in the same turn of the event loop

        listener = Listener(app, TOKEN)
        await listener.start(listening)
        answer = await post(RemoteModel(pool_of(r=listening.getsockname()[1])))
        assert (answer.status, len(answer.body)) == (200, 300_000)

    run(work)
