"""The connection between gateway and replica: data arrives complete, and a slow client delays no other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from quantserve.serve.asgi import read_body, request_scope
from quantserve.serve.listener import Listener
from quantserve.serve.remote import RemoteModel
from quantserve.serve.replicas import Limits, Pool
from quantserve.serve.upstream import ReplicaLost, Response, Timing, Upstream
from quantserve.serve.wire import Frames, Kind, frame, pack_head, pack_hello, unpack_head

from .asgi_client import request
from .replica import HELLO, TOKEN, Replica, open_frames, pool_of, post, run, served, session_of, until


async def read_all(response: Response) -> bytes:
    data = bytearray()
    while piece := await response.read():
        data += piece
    return bytes(data)


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


def test_a_head_response_is_complete_without_a_body() -> None:
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


def test_strangers_are_not_answered() -> None:
    async def work() -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            raise AssertionError("a stranger got in")

        hello, ask = frame(Kind.HELLO, 0, pack_hello(15, b"wrong")), open_frames(1, "GET")
        bare = frame(Kind.HELLO, 0, TOKEN.encode())
        async with served(app) as port:
            for said in (b"GET / HTTP/1.1\r\n\r\n", hello + ask, ask, bare + ask, frame(Kind.HELLO, 0), b"\xff" * 4096):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(said)
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
                writer.close()
            with pytest.raises(ReplicaLost):
                await Upstream("127.0.0.1", port, "another").request("GET", b"/health")

    run(work)


def test_the_first_of_many_simultaneous_requests_begins_before_the_last() -> None:
    """Each request takes five turns of the event loop; all at once they would all be through in the last turns."""

    async def work() -> None:
        begun: list[bytes] = []
        through: list[int] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            begun.append(await read_body(receive))
            for _ in range(5):
                await asyncio.sleep(0)
            through.append(len(begun))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        async with served(app) as port:
            upstream = Upstream("127.0.0.1", port, TOKEN)
            await (await upstream.request("POST", b"/", (), b"first")).read()
            begun.clear()
            through.clear()
            asked = [upstream.request("POST", b"/", (), b"%d" % number) for number in range(40)]
            await asyncio.gather(*asked)
        assert begun == [b"%d" % number for number in range(40)]
        assert through[0] < 20  # of 40: so many had begun when the first one was through
        assert through == sorted(through)

    run(work)


def test_a_request_cancelled_before_it_begins_does_not_reach_the_model() -> None:
    async def work() -> None:
        begun: list[bytes] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            begun.append(await read_body(receive))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        async with served(app) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            said = [HELLO, *(open_frames(number, body=b"%d" % number) for number in range(1, 6)), frame(Kind.CANCEL, 4)]
            writer.write(b"".join(said))
            await until(lambda: b"5" in begun)
            writer.close()
        assert begun == [b"1", b"2", b"3", b"5"]

    run(work)


def test_a_slow_client_does_not_slow_the_others() -> None:
    async def work() -> None:
        replica = Replica()
        replica.chunks = [b"x" * 65536] * 40
        async with served(replica) as port:
            upstream = Upstream("127.0.0.1", port, TOKEN)
            slow = await upstream.request("POST", b"/", (), b"{}")
            for response in (await upstream.request("POST", b"/", (), b"{}"), slow):
                assert len(await read_all(response)) == 40 * 65536
                response.close()

    run(work)


def test_a_client_that_reads_nothing_stops_the_replica_at_the_size_of_its_buffer() -> None:
    async def work() -> None:
        produced = 0

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal produced
            await read_body(receive)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(100 if scope["path"] == "/slow" else 1):
                await send({"type": "http.response.body", "body": b"x" * 50_000, "more_body": True})
                produced += 50_000
            await send({"type": "http.response.body", "body": b""})

        async with served(app) as port:
            upstream = Upstream("127.0.0.1", port, TOKEN, Timing(buffer_bytes=200_000))
            response = await upstream.request("POST", b"/slow", (), b"{}")
            await until(lambda: produced == 200_000)
            for _ in range(20):  # time enough for more: other responses pass
                await read_all(await upstream.request("POST", b"/", (), b"{}"))
            assert produced == 200_000 + 20 * 50_000
            assert len(await read_all(response)) == 100 * 50_000

    run(work)


@pytest.mark.parametrize("size", [1, 7, 9, 64, 1 << 20])
def test_frames_are_parsed_at_any_split(size: int) -> None:
    sent = [(Kind.OPEN, 1, b""), (Kind.DATA, 2**32 - 1, b"\x00" * 300), (Kind.END, 3, b"e" * 9), (Kind.DATA, 4, b"x")]
    data = b"".join(frame(*one) for one in sent)
    frames = Frames()
    found = [one for at in range(0, len(data), size) for one in frames.feed(data[at : at + size])]
    assert found == sent


def test_a_head_cannot_smuggle_a_line() -> None:
    first, headers = unpack_head(pack_head(b"200", [(b"a", b"b:c"), (b"x", b"1\nset-cookie:evil"), (b"e", b"")]))
    assert (first, headers) == (b"200", [(b"a", b"b:c"), (b"e", b"")])


def test_a_removed_replica_completes_its_responses_before_the_connection_closes() -> None:
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
            await until(lambda: replica.requests)
            pool.update([])
            replica.hold.set()
            assert (await asked).status == 200
            (session,) = sessions
            await until(session._transport.is_closing)

    run(work)


def test_sent_data_arrives_although_the_replica_closes() -> None:
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
