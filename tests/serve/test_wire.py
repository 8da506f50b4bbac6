"""The connection between gateway and replica: data arrives complete, and a slow client delays no other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

import fuzzing
from fuzzing import frames as fuzzing_frames
from quantserve.serve.asgi import read_body, request_scope
from quantserve.serve.gateway.upstreams.pool import Limits, Pool
from quantserve.serve.gateway.upstreams.proxy import RemoteModel
from quantserve.serve.transport.client import AppFailed, ReplicaLost, Response, Timing, Upstream
from quantserve.serve.transport.frames import VERSION, Frames, Kind, frame
from quantserve.serve.transport.payloads import pack_head, pack_hello, pack_welcome, unpack_head
from quantserve.serve.transport.server import STRANGERS, Listener

from .asgi_client import request
from .replica import HELLO, TOKEN, Replica, open_frames, pool_of, post, run, served, session_of, until, unused_port


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


# --- one request delays no other


def test_a_large_answer_delays_no_other() -> None:
    """Read as sent: the small answer comes after a part of the 64 MiB answer, in frames of at most 64 KiB."""
    large = b"x" * (64 << 20)

    async def work() -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await read_body(receive)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": large if scope["path"] == "/large" else b"small"})

        async with served(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HELLO + open_frames(1, target=b"/large", window=1 << 30))
            frames, sizes, before, small = Frames(), [0], 0, False
            while sum(sizes) < len(large):
                data = await reader.read(1 << 16)
                assert data
                if sum(sizes) and not small:
                    writer.write(open_frames(2))
                    small = True
                for kind, number, payload in frames.feed(data):
                    if kind == Kind.DATA and number == 1:
                        sizes.append(len(payload))
                    elif kind == Kind.END and number == 2:
                        before = sum(sizes)
            writer.close()
            assert max(sizes) == 64 << 10
            assert 0 < before < 32 << 20

    run(work)


def test_a_large_body_delays_neither_another_request_nor_a_cancellation() -> None:
    async def work() -> None:
        replica = Replica()
        received: list[int] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/held":
                await replica(scope, receive, send)
                return
            received.append(len(await read_body(receive)))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        replica.hold = asyncio.Event()
        async with served(app) as port:
            upstream = Upstream("127.0.0.1", port, TOKEN)
            held = asyncio.create_task(upstream.request("POST", b"/held", (), b"{}"))
            await until(lambda: replica.requests)
            large = asyncio.create_task(upstream.request("POST", b"/", (), bytes(64 << 20)))
            await asyncio.sleep(0)
            held.cancel()
            (await upstream.request("POST", b"/", (), b"small")).close()
            await until(lambda: replica.cancelled)
            assert received == [5]
            (await large).close()
            assert received == [5, 64 << 20]

    run(work)


def test_a_large_request_that_is_cancelled_halfway_leaves_the_connection_usable() -> None:
    async def work() -> None:
        replica = Replica()
        async with served(replica) as port:
            upstream = Upstream("127.0.0.1", port, TOKEN)
            (await upstream.request("POST", b"/", (), b"{}")).close()
            large = asyncio.create_task(upstream.request("POST", b"/", (), bytes(64 << 20)))
            for _ in range(20):
                await asyncio.sleep(0)
            large.cancel()
            response = await upstream.request("POST", b"/", [(b"long", b"v" * 200_000)], b"{}")
            assert await read_all(response) == b"".join(replica.chunks)
            assert len(replica.requests) == 2
            assert len(upstream._connections) == 1

    run(work)


# --- lost peers


@contextlib.asynccontextmanager
async def raw_replica(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """A replica that says what `answer` writes; yields its port."""
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def test_requests_share_an_attempt_to_connect_and_fail_at_once_until_the_next_one() -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        with (
            socket.socket() as full,
            contextlib.ExitStack() as fillers,
        ):  # a full backlog drops SYN, as a lost host does
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            for _ in range(4):
                filler = fillers.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(full.getsockname())
            upstream = Upstream("127.0.0.1", full.getsockname()[1], TOKEN, Timing(connect_s=1.0))

            async def failed() -> float:
                with pytest.raises(ReplicaLost, match="within 1 s"):
                    await upstream.request("POST", b"/", (), b"{}")
                return loop.time()

            times = await asyncio.gather(*(failed() for _ in range(10)))
            assert max(times) - min(times) < 1.0
            assert await failed() - max(times) < 1.0
            port = full.getsockname()[1]
        upstream.port = port = unused_port()
        listener = Listener(Replica(), TOKEN)
        await listener.start(socket.create_server(("127.0.0.1", port)))
        while True:  # the next attempt follows in the background
            with contextlib.suppress(ReplicaLost):
                (await upstream.request("POST", b"/", (), b"{}")).close()
                break
            await asyncio.sleep(0.05)
        listener.close()
        upstream.close()

    run(work)


def test_a_replica_that_is_slow_is_not_lost_and_one_that_hangs_is() -> None:
    async def work() -> None:
        slow_s = 1.0

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(frame(Kind.WELCOME, 0, pack_welcome()))
            await asyncio.sleep(slow_s)  # three times silence_s
            writer.write(frame(Kind.ANSWER, 1, b"200") + frame(Kind.END, 1))
            await reader.read()

        async with raw_replica(answer) as port:
            upstream = Upstream("127.0.0.1", port, TOKEN, Timing(silence_s=0.33))
            response = await upstream.request("POST", b"/", (), b"{}")
            assert await response.read() == b""
            with pytest.raises(ReplicaLost, match="no sign of life"):
                await upstream.request("POST", b"/", (), b"{}")

    run(work)


def test_an_event_loop_that_was_blocked_does_not_take_its_peer_for_lost() -> None:
    async def work() -> None:
        replica = Replica()
        async with served(replica) as port:
            upstream = Upstream("127.0.0.1", port, TOKEN, Timing(silence_s=0.2))
            response = await upstream.request("POST", b"/", (), b"{}")
            time.sleep(1.0)
            assert await read_all(response) == b"".join(replica.chunks)
            (await upstream.request("POST", b"/", (), b"{}")).close()
            assert len(upstream._connections) == 1

    run(work)


def test_a_gateway_that_hangs_loses_its_requests_in_the_replica() -> None:
    async def work() -> None:
        replica = Replica()
        replica.hold = asyncio.Event()
        async with served(replica) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(frame(Kind.HELLO, 0, pack_hello(0.3, TOKEN.encode())) + open_frames(1))
            await until(lambda: replica.cancelled)
            kinds = [kind for kind, _, _ in Frames().feed(await reader.read())]
            assert kinds[:2] == [Kind.WELCOME, Kind.PING]
            writer.close()

    run(work)


def test_a_dead_replica_loses_its_connection_at_once() -> None:
    async def work() -> None:
        replica = Replica()
        replica.chunks *= 1000
        async with served(replica) as port:
            upstream = Upstream("127.0.0.1", port, TOKEN)
            response = await upstream.request("POST", b"/", (), b"{}")
            upstream.close()  # first it was draining
            assert await response.read()
            upstream.fail()
            with pytest.raises(ReplicaLost, match="dead"):
                await read_all(response)
            with pytest.raises(ReplicaLost, match="dead"):
                await upstream.request("POST", b"/", (), b"{}")

    run(work)


# --- peers that violate the protocol


def test_another_version_is_refused_with_both_versions(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with served(Replica()) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(frame(Kind.HELLO, 0, pack_hello(15, TOKEN.encode(), VERSION + 1)) + open_frames(1))
            ((kind, _, reason),) = Frames().feed(await reader.read())
            writer.close()
            assert (kind, reason) == (Kind.REFUSED, WRONG_VERSION)

        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(frame(Kind.REFUSED, 0, WRONG_VERSION))
            writer.close()

        async def another(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(frame(Kind.WELCOME, 0, pack_welcome(VERSION + 1)))

        async def unversioned(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        for answer, reason in (
            (refuse, WRONG_VERSION),
            (another, b"it has protocol version 2, this gateway has 1"),
            (unversioned, b"closed before WELCOME"),
        ):
            async with raw_replica(answer) as port:
                with pytest.raises(ReplicaLost, match=reason.decode()):
                    await Upstream("127.0.0.1", port, TOKEN).request("GET", b"/")

    run(work)
    assert WRONG_VERSION.decode() in caplog.text


WRONG_VERSION = b"the gateway has protocol version 2, this replica has 1; run the same version of quantserve on both"
OPEN_LENGTHS = struct.Struct("!III")
TO_REPLICA = {
    "unknown kind": frame(77, 3),
    "kind of the other direction": frame(Kind.DATA, 1, b"x"),
    "HELLO twice": HELLO,
    "number of a running request": open_frames(1),
    "BODY of no request": frame(Kind.BODY, 9, b"x"),
    "BODY after the request": frame(Kind.BODY, 1, b"x"),
    "BODY beyond its length": frame(Kind.OPEN, 5, OPEN_LENGTHS.pack(7, 1, 0)) + frame(Kind.BODY, 5, b"POST / xx"),
    "OPEN cut short": frame(Kind.OPEN, 5, b"x"),
    "absurd head": frame(Kind.OPEN, 5, OPEN_LENGTHS.pack(2**31, 0, 0)),
    "absurd body": frame(Kind.OPEN, 5, OPEN_LENGTHS.pack(9, 2**32 - 1, 0)),
    "absurd window": frame(Kind.CREDIT, 1, b"\xff" * 4),
    "CREDIT without a number": frame(Kind.CREDIT, 1),
    "absurd frame": struct.pack("!IIB", 2**32 - 1, 5, Kind.OPEN),
    "method that is not UTF-8": frame(Kind.OPEN, 5, OPEN_LENGTHS.pack(4, 0, 0) + b"\xff\xfe /"),
    "header without colon": frame(Kind.OPEN, 5, OPEN_LENGTHS.pack(8, 0, 0) + b"GET /\nab"),
    "PING with a number": frame(Kind.PING, 9),
}
TO_GATEWAY = {
    "unknown kind": frame(77, 1),
    "kind of the other direction": frame(Kind.OPEN, 1, b"x"),
    "WELCOME twice": frame(Kind.WELCOME, 0, pack_welcome()),
    "DATA before ANSWER": frame(Kind.DATA, 1, b"x"),
    "END before ANSWER": frame(Kind.END, 1),
    "ANSWER twice": frame(Kind.ANSWER, 1, b"200") * 2,
    "frame after END": frame(Kind.ANSWER, 1, b"200") + frame(Kind.END, 1) * 2,
    "status that is no number": frame(Kind.ANSWER, 1, b"ok"),
    "status in other digits": frame(Kind.ANSWER, 1, "２００".encode()),  # noqa: RUF001
    "status out of range": frame(Kind.ANSWER, 1, b"101"),
    "more data than granted": frame(Kind.ANSWER, 1, b"200") + frame(Kind.DATA, 1, bytes(60_000)),
    "absurd frame": struct.pack("!IIB", 2**32 - 1, 1, Kind.DATA),
    "frame over 64 KiB": frame(Kind.DATA, 1, bytes((64 << 10) + 1)),
}


@pytest.mark.parametrize("sent", TO_REPLICA.values(), ids=TO_REPLICA)
def test_a_gateway_that_violates_the_protocol_is_disconnected(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    escaped: list[object] = []

    async def work() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: escaped.append(context))
        replica = Replica()
        replica.hold = asyncio.Event()
        async with served(replica) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HELLO + open_frames(1) + sent)
            with contextlib.suppress(ConnectionError):
                await reader.read()
            await until(lambda: not replica.requests or replica.cancelled)
            writer.close()
            replica.hold.set()
            upstream = Upstream("127.0.0.1", port, TOKEN)
            assert await read_all(await upstream.request("POST", b"/", (), b"{}")) == b"".join(replica.chunks)

    run(work)
    assert escaped == []
    assert "closed the connection to gateway 127.0.0.1" in caplog.text
    assert "protocol error: " in caplog.text


@pytest.mark.parametrize("sent", TO_GATEWAY.values(), ids=TO_GATEWAY)
def test_a_replica_that_violates_the_protocol_is_disconnected(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    escaped: list[object] = []

    async def work() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: escaped.append(context))
        closed = asyncio.Event()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(frame(Kind.WELCOME, 0, pack_welcome()))
            await reader.read(1000)
            await asyncio.sleep(0.02)
            writer.write(sent)
            with contextlib.suppress(ConnectionError):
                while await reader.read(1000):
                    pass
            closed.set()
            writer.close()

        async with raw_replica(answer) as port:
            upstream = Upstream("127.0.0.1", port, TOKEN, Timing(buffer_bytes=50_000))
            with contextlib.suppress(ReplicaLost):
                await read_all(await upstream.request("POST", b"/", (), b"{}"))
            await closed.wait()

    run(work)
    assert escaped == []
    assert "closed the connection to replica 127.0.0.1" in caplog.text
    assert "protocol error: " in caplog.text


def test_a_request_that_the_protocol_does_not_allow_is_not_sent() -> None:
    async def work() -> None:
        replica = Replica()
        async with served(replica) as port:
            upstream = Upstream("127.0.0.1", port, TOKEN)
            for method, target, size in ("GET", b"/\nx:y", 0), ("G T", b"/", 0), ("", b"/", 0), ("GET", b"/", 3 << 20):
                with pytest.raises(ValueError, match=r"a request with|a line break"):
                    await upstream.request(method.replace(" ", "\t"), target, [(b"a", b"v" * size)])
            (await upstream.request("GET", b"/")).close()
            assert len(upstream._connections) == len(replica.requests) == 1

    run(work)


@pytest.mark.parametrize("status", [99, 101, 600, 2000])
def test_an_app_with_a_status_outside_http_fails_alone(status: int) -> None:
    async def work() -> None:
        replica = Replica()
        async with served(replica) as port:
            upstream = Upstream("127.0.0.1", port, TOKEN)
            replica.head = (status, [])
            with pytest.raises(AppFailed):
                await upstream.request("POST", b"/", (), b"{}")
            replica.head = (200, [(b"long", b"v" * 70_000)])
            with pytest.raises(AppFailed):
                await upstream.request("POST", b"/", (), b"{}")
            replica.head = (200, [])
            (await upstream.request("POST", b"/", (), b"{}")).close()
            assert len(upstream._connections) == 1

    run(work)


HEAD = {"type": "http.response.start", "status": 200, "headers": []}
BODY = {"type": "http.response.body", "body": b"x"}


@pytest.mark.parametrize("messages", [[HEAD, HEAD, BODY], [BODY], [HEAD, {**BODY, "more_body": True}, HEAD]])
def test_an_app_with_messages_out_of_order_fails_alone(messages: list[Message]) -> None:
    async def work() -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            for message in messages if scope["path"] == "/wrong" else [HEAD, BODY]:
                await send(message)

        async with served(app) as port:
            upstream = Upstream("127.0.0.1", port, TOKEN)
            with pytest.raises(AppFailed):
                await read_all(await upstream.request("POST", b"/wrong", (), b"{}"))
            assert await read_all(await upstream.request("POST", b"/", (), b"{}")) == b"x"
            assert len(upstream._connections) == 1

    run(work)


def test_connections_without_a_token_are_bounded() -> None:
    async def work() -> None:
        replica = Replica()
        async with served(replica) as port:
            upstream = Upstream("127.0.0.1", port, TOKEN)
            (await upstream.request("GET", b"/")).close()
            began = asyncio.get_running_loop().time()
            idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(STRANGERS + 20)]
            for reader, _ in idle[:20]:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
            assert asyncio.get_running_loop().time() - began < 5  # before the handshake timeout of 6 s
            (await upstream.request("GET", b"/")).close()  # the gateway keeps its connection
            assert len(upstream._connections) == 1
            for _, writer in idle:
                writer.close()

    run(work)


def test_fuzzed_frames() -> None:
    report = fuzzing.run(fuzzing_frames.TARGET, 1500, seed=3)
    assert report.failures == []
    assert all(
        report.verdicts[f"{end}: {ending}"] > 100
        for end in ("replica", "gateway")
        for ending in ("open, sound", "closed")
    )


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 2**32 - 1), st.binary(max_size=300))), st.data())
def test_any_frames_are_parsed_at_any_split(sent: list[tuple[int, int, bytes]], data: st.DataObject) -> None:
    raw = b"".join(frame(*one) for one in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=20)))
    frames = Frames()
    found = [one for a, b in pairwise([0, *cuts, len(raw)]) for one in frames.feed(raw[a:b])]
    assert found == sent
