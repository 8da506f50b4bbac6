"""A replica with configurable responses, and a model that sends it requests."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send

from quantserve.serve.asgi import read_body
from quantserve.serve.gateway.upstreams.pool import Limits, Pool
from quantserve.serve.transport.frames import Kind, frame
from quantserve.serve.transport.payloads import pack_head, pack_hello, pack_request
from quantserve.serve.transport.server import Listener

from .asgi_client import Answer, request

TOKEN = "t0ken"
HELLO = frame(Kind.HELLO, 0, pack_hello(15, TOKEN.encode()))
SYSTEM = {"role": "system", "content": "be kind"}


@contextlib.asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[int]:
    """A replica in this event loop; yields its port."""
    listening = socket.create_server(("127.0.0.1", 0))
    listener = Listener(app, TOKEN)
    await listener.start(listening)
    try:
        yield listening.getsockname()[1]
    finally:
        listener.close()


class Replica:
    """Sends configured responses and records its requests."""

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


def open_frames(
    number: int, method: str = "POST", target: bytes = b"/", body: bytes = b"", window: int = 1 << 20
) -> bytes:
    """The encoded frames of a request."""
    head = pack_head(method.encode() + b" " + target, [])
    return b"".join(frame(kind, number, payload) for kind, payload in pack_request(head, body, window))


def session_of(send: Send) -> Any:
    """The connection that an app's answer goes to."""
    return send.__self__._session  # type: ignore[attr-defined]


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(120):
            return await work()

    return uvloop.run(bounded())  # as the gateway and the replicas


async def until(holds: Callable[[], object]) -> None:
    """Wait for what must come true, however slow the machine is; `run` bounds the wait."""
    while not holds():
        await asyncio.sleep(0.002)


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
