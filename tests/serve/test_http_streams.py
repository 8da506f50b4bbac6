"""Streams of the gateway's HTTP server: slow, absent and old clients, and the drain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import uvloop

from quantserve.serve.asgi import Guard, answer_lifespan
from quantserve.serve.gateway.http import connection as http_connection
from quantserve.serve.gateway.http.server import HttpServer
from quantserve.serve.gateway.middleware.limits import Policy
from quantserve.serve.gateway.middleware.trace import Traced

from .http_client import HEAD, MIB, Client, talk


@dataclass
class Log:
    """What the app of a server in this process saw."""

    began: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    stop: Callable[[], None] = lambda: None


@contextlib.contextmanager
def streaming(
    chunks: int = 3, pause: float = 0, size: int = 5, wait: float = 0, **limits: Any
) -> Iterator[tuple[int, Log]]:
    """A server in a thread whose app streams; it ends by `should_exit`."""
    log = Log()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await answer_lifespan(receive, send)
            return
        await asyncio.sleep(wait)
        message: dict[str, Any] = {"more_body": True}
        while message["more_body"]:
            message = await receive()
            log.body += message["body"]
        log.headers = scope["headers"]
        log.began.set()

        async def watch() -> None:
            await receive()
            log.left.set()

        leaving = asyncio.create_task(watch())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for _ in range(chunks):
            if log.left.is_set():
                break
            await send({"type": "http.response.body", "body": b"x" * (size - 1) + b"\n", "more_body": True})
            await asyncio.sleep(pause)
        await send({"type": "http.response.body"})
        leaving.cancel()

    listener = socket.create_server(("127.0.0.1", 0))
    server = HttpServer(Traced(Guard(app)), Policy(access_log="off", **limits))
    log.stop = lambda: setattr(server, "should_exit", True)

    def run() -> None:
        uvloop.run(server.serve(sockets=[listener]))
        log.stopped.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield listener.getsockname()[1], log
    finally:
        log.stop()
        thread.join(120)
        assert not thread.is_alive()


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_stream_has_chunks_only_for_clients_that_know_them(version: bytes) -> None:
    with streaming() as (port, _):
        for connection in (b"close", b"keep-alive"):
            request = b"GET / HTTP/%s\r\nhost: x\r\nconnection: %s\r\n\r\n" % (version, connection)
            with Client(port) as client:
                client.send(request)
                response = client.until(b"0\r\n\r\n") if version == b"1.1" else client.rest()
            head, _, body = response.partition(b"\r\n\r\n")
            if version == b"1.1":
                assert body == b"5\r\nxxxx\n\r\n" * 3 + b"0\r\n\r\n"
            else:
                assert body == b"xxxx\n" * 3
                assert b"transfer-encoding" not in head
                assert b"connection: close" in head


@pytest.mark.parametrize("chunks", [10**9, 50], ids=["stream in progress", "complete response"])
def test_a_client_that_reads_nothing_is_disconnected(chunks: int) -> None:
    with (
        streaming(chunks, size=65536, send_timeout_s=0.5, drain_timeout_s=60) as (port, log),
        Client(port, buffer=4096) as client,
    ):
        client.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert log.began.wait(120)
        assert chunks == 50 or log.left.wait(120)
        log.stop()
        assert log.stopped.wait(50)  # not delayed by data that nobody reads


def test_a_slow_client_that_reads_is_not_disconnected() -> None:
    with streaming(chunks=50, size=65536, send_timeout_s=2) as (port, log), Client(port, buffer=65536) as client:
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        assert log.began.wait(120)
        found = 0
        while part := client.socket.recv(32768):
            found += len(part)
            time.sleep(0.04)
        assert found > 50 * 65536
        assert not log.left.is_set()


def test_the_app_learns_that_a_client_with_a_queued_request_left() -> None:
    with streaming(chunks=10**6, pause=0.01, drain_timeout_s=1) as (port, log):
        with Client(port) as client:
            client.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 2)
            assert log.began.wait(120)
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        assert log.left.wait(120)


def test_trailers_are_not_headers() -> None:
    with streaming() as (port, log):
        chunks = b"2\r\nab\r\n0\r\nauthorization: Bearer x\r\n\r\n"
        talk(port, b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n" + HEAD + chunks)
    assert log.body == b"ab"
    assert b"authorization" not in dict(log.headers)


def test_the_body_timeout_does_not_count_while_the_gateway_does_not_read() -> None:
    with streaming(wait=3, body_timeout_s=1.5) as (port, log), Client(port) as client:
        client.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (16 * MIB) + b"x" * (16 * MIB))
        client.until(b"0\r\n\r\n")
    assert len(log.body) == 16 * MIB


def test_it_drains_and_leaves_signal_handlers_alone() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with streaming(chunks=50, pause=0.01, drain_timeout_s=20) as (port, log), Client(port) as client:
        client.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert log.began.wait(120)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        with Client(port) as idle:
            log.stop()
            assert idle.rest() == b""
        assert client.rest().endswith(b"0\r\n\r\n")


def test_connections_have_the_options_that_notice_lost_clients() -> None:
    with (
        streaming(chunks=10**6, pause=0.01, send_timeout_s=8, drain_timeout_s=1) as (port, log),
        Client(port) as client,
    ):
        client.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert log.began.wait(120)
        connections = psutil.Process().net_connections("tcp")
        (accepted,) = [one for one in connections if one.raddr == client.socket.getsockname()]
        with socket.socket(fileno=os.dup(accepted.fd)) as peer:
            assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 8000
            assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 2


def test_a_bad_request_does_not_end_the_responses_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "LINGER_S", 0.1)
    with streaming(chunks=20, pause=0.02) as (port, _):
        response = talk(port, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 3 + b"BREW / HTTP/1.1\r\n\r\n")
    assert response.count(b"xxxx\n\r\n0\r\n\r\n") == 3
    assert b"HTTP/1.1 400 " in response
