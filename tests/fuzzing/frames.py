"""Frames between gateway and replica: sound conversations and damaged ones, in reads of any size, at both ends.

A sound conversation is answered as an independent reading of the frames expects. A damaged one ends in a closed
connection or is answered; no exception leaves the protocol, nothing hangs, and no more than a frame is buffered.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any

from starlette.types import Receive, Scope, Send

from fuzzing import Target, mutated
from quantserve.serve.transport.connection import AppFailed, Connection, ReplicaLost, Response, Timing
from quantserve.serve.transport.frames import MAX_PAYLOAD, VERSION, Frames, Kind, frame
from quantserve.serve.transport.payloads import pack_head, pack_hello, pack_number, pack_request, pack_welcome
from quantserve.serve.transport.server import Listener, _Session

TOKEN = b"t0ken"
SIZES = [0, 1, 9, 300, 5000, MAX_PAYLOAD - 1, MAX_PAYLOAD, MAX_PAYLOAD + 1, 200_000]
HEADERS = [(b"a", b"b:c"), (b"x", b""), (b"", b"\xff"), (b"content-length", b"-1"), (b"long", b"v" * 70_000)]
STATUSES = [b"200", b"503", b"599", b"100", b"600", b"-20", b"2e2", b"", b"\xff\xff\xff", b"2000", b"\xef\xbc\x92" * 3]
WINDOW = 100_000

Conversation = tuple[str, list[bytes], int, bool]
"""The end that receives it, its reads, a seed, and whether it is sound."""


def make(chance: random.Random) -> Conversation:
    """Frames for one of the ends, with a mistake in two of three."""
    end = chance.choice(["replica", "gateway"])
    frames = _to_replica(chance) if end == "replica" else _to_gateway(chance)
    sound = chance.random() < 0.33
    if not sound:
        _damage(chance, frames)
    raw = b"".join(frames)
    if not sound and chance.random() < 0.3:
        raw = mutated(chance, raw)
    size = chance.choice([1 if len(raw) < 2000 else 997, 13 if len(raw) < 9000 else 4096, 65536, 1 << 20])
    return end, [raw[at : at + size] for at in range(0, len(raw), size)], chance.randrange(2**32), sound


def _to_replica(chance: random.Random) -> list[bytes]:
    """HELLO and up to four requests, their frames interleaved."""
    streams = []
    for number in chance.sample(range(1, 2**32), chance.randint(0, 4)):
        head = pack_head(
            chance.choice([b"POST", b"GET", b"HEAD"]) + b" /" + b"p" * chance.choice([0, 9, 70_000]), HEADERS[:3]
        )
        window = chance.choice([0, 1, 7, MAX_PAYLOAD, 1 << 20])
        body = bytes(chance.choice(SIZES))
        sent = [frame(kind, number, payload) for kind, payload in pack_request(head, body, window)]
        sent += [frame(Kind.CREDIT, number, pack_number(1 << 20)) for _ in range(chance.randint(1, 3))]
        sent += [frame(Kind.PING, 0)] * chance.randint(0, 1)
        streams.append(sent)
    return [frame(Kind.HELLO, 0, pack_hello(15, TOKEN)), *_interleaved(chance, streams)]


def _to_gateway(chance: random.Random) -> list[bytes]:
    """WELCOME and responses to requests 1 to 4, their frames interleaved."""
    streams = []
    for number in range(1, chance.randint(1, 5)):
        sent = [frame(Kind.ANSWER, number, pack_head(b"200", chance.sample(HEADERS[:4], 2)))]
        left = WINDOW
        for _ in range(chance.randint(0, 5)):
            size = min(left, chance.choice(SIZES), MAX_PAYLOAD)
            left -= size
            sent.append(frame(Kind.DATA, number, chance.randbytes(8).ljust(8)[:size].ljust(size, b"d")))
        sent.append(frame(chance.choice([Kind.END, Kind.END, Kind.FAILED]), number))
        streams.append(sent)
    return [frame(Kind.WELCOME, 0, pack_welcome()), *_interleaved(chance, streams)]


def _interleaved(chance: random.Random, streams: list[list[bytes]]) -> list[bytes]:
    streams = [stream for stream in streams if stream]
    mixed = []
    while streams:
        stream = chance.choice(streams)
        mixed.append(stream.pop(0))
        streams = [left for left in streams if left]
    return mixed


def _damage(chance: random.Random, frames: list[bytes]) -> None:
    """Put mistakes into a conversation."""
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(frames) + 1)
        number = chance.choice([0, 1, 2, 3, 4, 9, 2**32 - 1])
        match chance.randrange(9):
            case 0:
                frames.insert(at, frame(chance.choice(list(Kind)), number, chance.randbytes(chance.choice([0, 4, 40]))))
            case 1:
                frames.insert(at, frame(200, number))
            case 2 if at < len(frames):
                del frames[at]
            case 3 if at < len(frames):
                frames.insert(chance.randrange(len(frames)), frames[at])
            case 4:
                frames.insert(
                    at, frame(Kind.ANSWER, number, chance.choice(STATUSES) + b"\nno colon" * chance.choice([0, 1]))
                )
            case 5:
                lengths = [chance.choice([0, 1, 30, 2**31, 2**32 - 1]) for _ in range(3)]
                payload = b"".join(value.to_bytes(4) for value in lengths) + chance.choice(
                    [b"", b"GET /", b"G\xffT /", b"POST /\nx", b" ", b"\n\n"]
                )
                frames.insert(at, frame(Kind.OPEN, number, payload))
            case 6:
                frames.insert(at, chance.choice([2**17, 2**31, 2**32 - 1]).to_bytes(4) + chance.randbytes(5))
            case 7:
                frames.insert(at, frame(Kind.CREDIT, number, chance.choice([b"", b"\xff" * 4, b"\0" * 4, b"\0" * 5])))
            case _:
                version = chance.choice([0, VERSION, VERSION + 1, 255])
                frames[:1] = [
                    chance.choice(
                        [
                            frame(Kind.HELLO, 0, pack_hello(15, TOKEN, version)),
                            frame(Kind.HELLO, 0, TOKEN),
                            frame(Kind.WELCOME, 0, pack_welcome(version)),
                            frame(Kind.REFUSED, 0, chance.randbytes(30)),
                            b"GET / HTTP/1.1\r\n\r\n",
                        ]
                    )
                ]


class _Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__({"socket": self, "peername": ("test", 1)})
        self.written: list[bytes] = []
        self.closed = False

    def setsockopt(self, *_: Any) -> None: ...

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": scope["headers"]})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b"end"})


def _feed(link: Any, wire: _Wire, reads: list[bytes]) -> None:
    link.connection_made(wire)
    for read in reads:
        if wire.closed:
            break
        link.data_received(read)
        assert len(link._frames._rest) <= MAX_PAYLOAD + 9 + len(read), "more than a frame is buffered"


async def _turns(count: int = 30) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def _replica(reads: list[bytes], sound: bool) -> str:
    listener = Listener(_app, TOKEN.decode())
    session, wire = _Session(listener), _Wire()
    _feed(session, wire, reads)
    for _ in range(40):
        await _turns()
        if not session._tasks and not session._beginning:
            break
    closed = wire.closed
    answered = [kind for kind, _, _ in Frames().feed(b"".join(wire.written))].count(Kind.END)
    if sound:
        given = [kind for kind, _, _ in Frames().feed(b"".join(reads))].count(Kind.OPEN)
        assert not closed, session.reason
        assert answered == given, f"{answered} of {given} requests were answered"
    session.close()
    session.connection_lost(None)
    await _turns()
    assert not session._tasks, "a request outlives its connection"
    assert not listener.sessions
    return f"replica: {'closed' if closed else 'open'}"


async def _gateway(reads: list[bytes], seed: int, sound: bool) -> str:
    chance = random.Random(seed)
    connection = Connection(TOKEN.decode(), Timing(buffer_bytes=WINDOW), lambda lost: None)
    wire = _Wire()
    readers: list[asyncio.Task[bytes | None]] = []
    connection.connection_made(wire)
    responses = [connection.begin() for _ in range(4)]
    if chance.random() < 0.5:
        readers = [asyncio.create_task(_read(response)) for response in responses]
    for read in reads:
        if wire.closed:
            break
        connection.data_received(read)
        assert len(connection._frames._rest) <= MAX_PAYLOAD + 9 + len(read), "more than a frame is buffered"
        if readers:
            await asyncio.sleep(0)
    closed = wire.closed
    assert not (sound and closed), connection.reason
    connection.close()
    connection.connection_lost(None)
    readers = readers or [asyncio.create_task(_read(response)) for response in responses]
    bodies = await asyncio.wait_for(asyncio.gather(*readers), 120)
    if sound:
        expected: dict[int, bytes] = {}
        ended = set()
        for kind, number, payload in Frames().feed(b"".join(reads)):
            if kind == Kind.DATA:
                expected[number] = expected.get(number, b"") + payload
            elif kind == Kind.END:
                ended.add(number)
        for response, body in zip(responses, bodies, strict=True):
            assert body == (expected.get(response.number, b"") if response.number in ended else None)
    return f"gateway: {'closed' if closed else 'open'}"


async def _read(response: Response) -> bytes | None:
    data = bytearray()
    try:
        await response.head()
        while piece := await response.read():
            data += piece
    except (ReplicaLost, AppFailed):
        return None
    finally:
        response.close()
    return bytes(data)


def judge(given: Conversation) -> str:
    """Hold one conversation."""
    end, reads, seed, sound = given
    escaped: list[dict[str, Any]] = []

    async def hold() -> str:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: escaped.append(context))
        return await (_replica(reads, sound) if end == "replica" else _gateway(reads, seed, sound))

    logging.disable(logging.WARNING)
    try:
        verdict = asyncio.run(hold())
    finally:
        logging.disable(logging.NOTSET)
    assert not escaped, escaped
    return verdict + (", sound" if sound else "")


TARGET = Target("frames", make, judge)
