"""An HTTP server that does what a script says, byte by byte and second by second, and remembers when it did it."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Self

Step = bytes | float | str
"""Bytes to write, seconds to wait, ``close`` or ``reset``."""
Script = Callable[[int, dict[str, Any]], Iterable[Step]]
"""From the number of the request and its body to the steps of the answer."""


@dataclass
class Exchange:
    """One request the server has seen: its head and body, when it came, and when each write was made."""

    head: str
    body: dict[str, Any]
    came: float
    connection: int
    writes: list[float] = field(default_factory=list)
    left: float | None = None


class FakeServer:
    """Serves on a free port from a thread, with TLS if it gets a context; a context manager."""

    def __init__(self, script: Script, tls: ssl.SSLContext | None = None) -> None:
        self.script = script
        self._tls = tls
        self.exchanges: list[Exchange] = []
        self.connections = 0
        self.most_in_flight = 0
        self._in_flight = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(120)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(120)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._main())

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        try:
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                length = next((int(x.split(":")[1]) for x in head.lower().split("\r\n") if "content-length" in x), 0)
                body = json.loads(await reader.readexactly(length) or b"{}")
                exchange = Exchange(head, body, perf_counter(), number)
                self.exchanges.append(exchange)
                self._in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self._in_flight)
                try:
                    await self._answer(self.script(len(self.exchanges) - 1, body), exchange, writer)
                finally:
                    self._in_flight -= 1
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            if self.exchanges:
                self.exchanges[-1].left = perf_counter()
            writer.close()

    async def _answer(self, steps: Iterable[Step], exchange: Exchange, writer: asyncio.StreamWriter) -> None:
        for step in steps:
            if isinstance(step, bytes):
                exchange.writes.append(perf_counter())
                writer.write(step)
                await writer.drain()
            elif isinstance(step, float):
                await asyncio.sleep(step)
            elif step == "close":
                writer.close()
                return
            else:
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                writer.transport.abort()
                return


# --- what scripts are made of


def head(status: int = 200, content_type: str = "text/event-stream", *lines: str) -> bytes:
    """Head of an answer in chunks."""
    fields = (f"HTTP/1.1 {status} X", f"Content-Type: {content_type}", "Transfer-Encoding: chunked", *lines)
    return "\r\n".join(fields).encode() + b"\r\n\r\n"


def whole(status: int, value: object, *lines: str) -> bytes:
    """A complete answer with a length."""
    body = json.dumps(value).encode()
    fields = (f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(body)}", *lines)
    return "\r\n".join(fields).encode() + b"\r\n\r\n" + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


END = b"0\r\n\r\n"


def event(value: object) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def delta(**fields: Any) -> bytes:
    """An event of a chat."""
    return event({"choices": [{"index": 0, "delta": fields, "finish_reason": None}]})


ROLE = delta(role="assistant", content="")
FINISH = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
DONE = event(b"[DONE]")


def usage(prompt: int, completion: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}})


def stream(bursts: Sequence[tuple[float, Sequence[str]]], prompt: int = 10, role_after: float = 0.0) -> Iterator[Step]:
    """A chat: the role, bursts of tokens each after a delay and in one write, finish, usage, end."""
    yield head()
    yield role_after
    yield chunk(ROLE)
    for delay, tokens in bursts:
        yield delay
        yield b"".join(chunk(delta(content=token)) for token in tokens)
    yield chunk(FINISH) + chunk(usage(prompt, sum(len(tokens) for _, tokens in bursts))) + chunk(DONE) + END
