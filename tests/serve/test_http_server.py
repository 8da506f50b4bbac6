"""The gateway's HTTP server: what a client may cost before it is known, and any bytes that it may send."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import uvloop
from uvicorn.protocols.http import httptools_impl

from quantserve.serve.asgi import Guard, answer_lifespan
from quantserve.serve.gateway.http import connection as http_connection
from quantserve.serve.gateway.http.connection import Connection
from quantserve.serve.gateway.http.exchange import Exchange
from quantserve.serve.gateway.http.idle import MOST_CLOSING, IdleConnections
from quantserve.serve.gateway.http.server import RESERVED_FILES, HttpServer, connections_for
from quantserve.serve.gateway.http.timeouts import Deadline
from quantserve.serve.gateway.middleware.limits import Policy
from quantserve.serve.gateway.middleware.trace import Traced

from .server import until

MIB = 1 << 20
HEAD = b"host: x\r\nconnection: close\r\n\r\n"
MODELS = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"


class Client:
    """A client's socket."""

    def __init__(self, port: int, timeout: float = 20, buffer: int = 0) -> None:
        self.socket = socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(timeout)
        self.socket.connect(("127.0.0.1", port))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> bool:
        """Whether the server took the data."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def until(self, end: bytes) -> bytes:
        """What arrives up to `end`."""
        found = b""
        while not found.endswith(end):
            part = self.socket.recv(65536)
            assert part, f"closed after {found!r}"
            found += part
        return found

    def drip(self, data: bytes) -> None:
        """Send data again and again, until the server responds or closes."""
        begun = time.monotonic()
        while not select.select([self.socket], [], [], 0.05)[0] and self.send(data):
            assert time.monotonic() - begun < 120

    def rest(self) -> bytes:
        """What arrives until the server closes."""
        found = b""
        while part := self._part():
            found += part
        return found

    def _part(self) -> bytes:
        try:
            return self.socket.recv(65536)
        except ConnectionResetError:
            return b""


def talk(port: int, data: bytes) -> bytes:
    """The response to these bytes, up to the end of the connection."""
    with Client(port) as client:
        client.send(data)
        return client.rest()


def error(response: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of a response in the envelope."""
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


@dataclass
class Gateway:
    """A gateway process without replicas."""

    port: int
    process: subprocess.Popen[str]
    log: Path
    errors: Path

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The lines of the access log."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@contextlib.contextmanager
def gateway(folder: Path, files: int = 0, **limits: Any) -> Iterator[Gateway]:
    """A gateway process; `files` is its hard limit of open files."""
    log, errors = folder / "access.jsonl", folder / "stderr"
    policy = Policy(access_log=str(log), drain_timeout_s=1, **limits).model_dump(mode="json")
    models = [
        {"card": {"id": name, "object": "model", "metadata": {}}, "route": f"/{name}", "aliases": [], "limits": {}}
        for name in ("a", "b")
    ]
    settings = {"models": models, "token": "t", "policy": policy, "parent": os.getpid()}
    with socket.create_server(("127.0.0.1", 0)) as listener, errors.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "quantserve.serve.gateway.process", str(listener.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            pass_fds=[listener.fileno()],
        )
        if files:
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (files // 2, files))
        port = listener.getsockname()[1]
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(settings) + "\n")
        process.stdin.flush()
        assert process.stdout.readline(), errors.read_text()
        threading.Thread(target=process.stdout.read, daemon=True).start()
        assert talk(port, b"GET /v1/models HTTP/1.1\r\n" + HEAD).endswith(b"}]}")
        yield Gateway(port, process, log, errors)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with short timeouts, whose log must hold no error at the end."""
    folder = tmp_path_factory.mktemp("gateway")
    with gateway(folder, head_timeout_s=0.5, body_timeout_s=0.5, keep_alive_s=0.5) as running:
        yield running
        assert running.process.poll() is None
        assert running.errors.read_text() == ""


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with the default timeouts."""
    with gateway(tmp_path_factory.mktemp("patient")) as running:
        yield running


ENDLESS = {
    "tiny headers": (b"GET / HTTP/1.1\r\nhost: x\r\n", b"a: b\r\n" * 20_000),
    "one header": (b"GET / HTTP/1.1\r\nhost: x\r\na: ", b"b" * 120_000),
    "header name": (b"GET / HTTP/1.1\r\nhost: x\r\n", b"b" * 120_000),
    "request target": (b"GET /", b"b" * 120_000),
    "empty lines": (b"", b"\r\n" * 60_000),
    "chunk extension": (b"POST /v1/x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1;", b"x" * 120_000),
    "trailers": (b"POST /v1/x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * 20_000),
    "trailer": (b"POST /v1/x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\na: ", b"b" * 120_000),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_memory_does_not_grow_with_what_is_not_body(patient: Gateway, name: str) -> None:
    start, more = ENDLESS[name]
    before, sent = patient.memory, 0
    with Client(patient.port) as client:
        client.send(start)
        while sent < 39 * MIB and client.send(more):
            sent += len(more)
        status, found = error(client.rest())
    assert (status, found["code"]) == (431, "request_header_fields_too_large")
    assert found["message"].endswith("exceed the limit of 64 KiB.")
    assert patient.memory - before < 8 * MIB


def test_a_head_below_the_limit_is_served(patient: Gateway) -> None:
    target = b"/v1/models?" + b"q" * 20_000
    answer = talk(patient.port, b"GET %s HTTP/1.1\r\na: %s\r\n" % (target, b"b" * 40_000) + HEAD)
    assert answer.startswith(b"HTTP/1.1 200 ")
    answer = talk(patient.port, b"GET %s HTTP/1.1\r\na: %s\r\n" % (target, b"b" * 50_000) + HEAD)
    assert error(answer)[0] == 431


def test_a_body_in_tiny_chunks_is_read(patient: Gateway) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n" + HEAD
    body = json.dumps({"model": "a", "pad": "x" * 50_000}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    status, found = error(talk(patient.port, head + chunks + b"0\r\n\r\n"))
    assert (status, found["code"]) == (503, "model_unavailable")  # it was read: model `a` has no replica


@pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\nhos", b"G", b"GET / HTTP/1.1\r\nhost: x\r\n"])
def test_a_slow_head_gets_408(edge: Gateway, start: bytes) -> None:
    with Client(edge.port) as client:
        client.send(start)
        response = client.rest()
    if b"/" in start:
        assert error(response) == (
            408,
            {
                "message": "The request's headers did not arrive within 0.5 s.",
                "type": "invalid_request_error",
                "param": None,
                "code": "request_timeout",
            },
        )


def test_progress_does_not_extend_the_head_timeout(edge: Gateway) -> None:
    with Client(edge.port) as client:
        client.send(b"GET / HTTP/1.1\r\n")
        client.drip(b"a: b\r\n")
        assert error(client.rest())[0] == 408


@pytest.mark.parametrize("first", [b"", MODELS])
@pytest.mark.parametrize("idle", [b"", b"\r\n"])
def test_an_idle_connection_is_closed_without_a_response(edge: Gateway, first: bytes, idle: bytes) -> None:
    with Client(edge.port) as client:
        if first:
            client.send(first)
            client.until(b"}]}")
        client.drip(idle)
        assert client.rest() == b""


def test_a_slow_later_head_gets_408(edge: Gateway) -> None:
    with Client(edge.port) as client:
        client.send(MODELS)
        client.until(b"}]}")
        client.send(MODELS[:20])
        assert error(client.rest())[0] == 408
        client.socket.close()
    with Client(edge.port) as client:
        client.send(MODELS + MODELS[:20])
        client.until(b"}]}")
        assert error(client.rest())[0] == 408


@pytest.mark.parametrize("path", [b"/v1/completions", b"/a/v1/audio/transcriptions"])
def test_a_slow_body_gets_408(edge: Gateway, path: bytes) -> None:
    head = b"POST %s HTTP/1.1\r\nhost: x\r\nx-request-id: slow\r\ncontent-length: 100\r\n\r\n" % path
    with Client(edge.port) as client:
        client.send(head)
        client.drip(b"x")
        response = client.rest()
    assert error(response)[0] == 408
    assert error(response)[1]["message"] == "The request body did not arrive within 0.5 s."
    assert b"connection: close" in response


def test_refusals_of_the_server_are_logged(edge: Gateway) -> None:
    talk(edge.port, b"BREW /pot HTTP/1.1\r\n" + HEAD)
    talk(edge.port, b"GET /long?secret HTTP/1.1\r\na: " + b"b" * 100_000 + b"\r\n" + HEAD)

    def logged() -> set[tuple[str, int, str]]:
        return {(line["path"], line["status"], line.get("error", "")) for line in edge.requests}

    until(lambda: ("/long", 431, "request_header_fields_too_large") in logged())
    assert ("-", 400, "invalid_http_request") in logged()


TARGETS = [
    b"*", b"/", b"//", b"//v1/models", b"/%", b"/%zz", b"/%ff%00", b"/%2e%2e/%2F", b"/../..", b"/?", b"/?%ff=%", b"/#",
    b"http://h", b"http://h/v1/models", b"http://", b"https://u:p@h:99999/", b"http://[::1/", b"h:443", b"a", b"?", b"",
    b"/\xff", b"/\xf0\x9f\x98\x80", b"/\x00", b"/\x7f", b"/a b", b"/" + b"a/" * 9000, b"/v1/models/" + b"%F0%9F" * 500,
]  # fmt: skip
METHODS = [
    b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"TRACE", b"CONNECT", b"PROPFIND", b"M-SEARCH",
    b"SOURCE", b"QUERY", b"PRI", b"BREW", b"get", b"", b"A" * 100_000, b"\x00", b"\xff",
]  # fmt: skip
HEADERS = [
    b"content-length: 1\r\ncontent-length: 2", b"content-length: 2\r\ncontent-length: 2", b"content-length: +2",
    b"content-length: -1", b"content-length: 0x2", b"content-length: 2, 2", b"content-length: " + b"9" * 30,
    b"content-length:", b"content-length: 2\r\ntransfer-encoding: chunked", b"transfer-encoding: gzip",
    b"transfer-encoding: chunked, gzip", b"transfer-encoding: chunked\r\ntransfer-encoding: chunked",
    b"transfer-encoding: \x0bchunked", b"transfer_encoding: chunked", b"content_length: 5", b"a_b: \xff", b"a b: c",
    b": c", b"a\x00b: c", b"a: \x00", b"a: b\n c: d", b"a: b\rc: d", b"a: b\r\n c", b" a: b", b"a", b"\xff: b",
    b"expect: 100-continue", b"expect: a", b"upgrade: websocket\r\nconnection: upgrade", b"connection: upgrade",
    b"upgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\nconnection: Upgrade, HTTP2-Settings",
    b"host: a\r\nhost: b", b"host: \xff", b"x-forwarded-for: \xff, ,,\r\nx-forwarded-proto: \xff",
    b"authorization: \xff", b"content-type: multipart/form-data", b"forwarded: for=\xff",
    b"content-type: \xff", b"content-encoding: gzip", b"accept-encoding: \xff", b"te: trailers", b"range: bytes=0-",
    b"cookie: \xff", b"x-request-id: \xff", b"connection: \xff",
]  # fmt: skip
VERSIONS = [b"HTTP/1.0", b"HTTP/1.1", b"HTTP/2.0", b"HTTP/0.9", b"HTTP/9.9", b"HTTP/1.1 ", b"http/1.1", b"ICY", b""]


def answered(port: int, data: bytes) -> None:
    """Check that every response to these bytes is below 500, or says that the model has no replica; none hangs."""
    response = talk(port, data)
    for part in response.split(b"HTTP/1.1 ")[1:]:
        if part[:3].isdigit():
            assert part.startswith((b"1", b"2", b"3", b"4")) or b"model_unavailable" in part, (data[:200], part)
    if b"\r\n\r\n" in response and b" 400 " in response[:13]:
        assert error(response)[1]["type"] == "invalid_request_error"


def test_no_request_target_is_an_error_of_the_server(edge: Gateway) -> None:
    for target in TARGETS:
        for method in (b"GET", b"OPTIONS", b"CONNECT"):
            answered(edge.port, b"%s %s HTTP/1.1\r\n" % (method, target) + HEAD)


def test_no_method_or_version_is_an_error_of_the_server(edge: Gateway) -> None:
    for method in METHODS:
        answered(edge.port, b"%s /v1/models HTTP/1.1\r\n" % method + HEAD)
    for version in VERSIONS:
        answered(edge.port, b"GET /v1/models %s\r\n" % version + HEAD)
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"\x00" * 100,
        b"\r" * 100,
        b"GET / HTTP/1.1\nhost: x\n\n",
        b"PRI * HTTP/2.0",
    ):
        answered(edge.port, data + b"\r\n\r\n")


def test_no_header_is_an_error_of_the_server(edge: Gateway) -> None:
    body = b'{"model": "a", "prompt": "hi"}'
    for lines in HEADERS:
        answered(edge.port, b"GET /v1/models HTTP/1.1\r\n%s\r\n" % lines + HEAD)
        answered(edge.port, b"GET /v1/models HTTP/1.0\r\n%s\r\n\r\n" % lines)
        sized = b"" if b"length:" in lines or b"encoding:" in lines else b"content-length: %d\r\n" % len(body)
        answered(edge.port, b"POST /v1/completions HTTP/1.1\r\n%s\r\n%s" % (lines, sized) + HEAD + body)


@pytest.mark.parametrize("wish", [b"upgrade: h2c\r\nhttp2-settings: AA", b"upgrade: websocket", b"upgrade: TLS/1.0"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_request_that_offers_another_protocol_keeps_its_body(edge: Gateway, wish: bytes, apart: bool) -> None:
    body = b'{"model": "no-such-model"}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\n%s\r\ncontent-length: %d\r\n\r\n"
    with Client(edge.port) as client:
        client.send(head % (wish, len(body)) + (b"" if apart else body + MODELS))
        if apart:
            time.sleep(0.1)
            client.send(body + MODELS)
        responses = client.rest()
    assert b"The model `no-such-model` does not exist." in responses
    assert responses.endswith(b"]}")  # and the request behind it was read as one
    assert responses.count(b"HTTP/1.1 ") == 2


def test_pipelined_requests_are_answered_in_order_up_to_a_limit(edge: Gateway) -> None:
    paths = [b"/%d" % number for number in range(3)]
    responses = talk(edge.port, b"".join(b"GET /n%s HTTP/1.1\r\nhost: x\r\n\r\n" % path for path in paths))
    assert [responses.index(b"/n" + path) for path in paths] == sorted(responses.index(b"/n" + path) for path in paths)
    before, count = edge.memory, 0
    with Client(edge.port) as client:
        client.socket.settimeout(1)
        with contextlib.suppress(TimeoutError):
            while count < 1000 and client.send(MODELS * 1000):
                count += 1
        client.socket.settimeout(20)
        responses = client.rest()
    assert b"too_many_pipelined_requests" in responses
    assert responses.count(b"HTTP/1.1 200") < 100
    assert edge.memory - before < 8 * MIB


def test_a_bad_request_behind_another_is_answered_after_it(edge: Gateway) -> None:
    first, second, third = talk(edge.port, MODELS + b"BREW / HTTP/1.1\r\n\r\n").split(b"HTTP/1.1 ")
    assert first == b""
    assert second.startswith(b"200 ")
    assert third.startswith(b"400 ")


def test_a_bad_request_does_not_end_the_responses_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "LINGER_S", 0.1)
    with streaming(chunks=20, pause=0.02) as (port, _):
        response = talk(port, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 3 + b"BREW / HTTP/1.1\r\n\r\n")
    assert response.count(b"xxxx\n\r\n0\r\n\r\n") == 3
    assert b"HTTP/1.1 400 " in response


def test_a_client_that_is_still_sending_gets_the_response(edge: Gateway) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with Client(edge.port) as client:
        client.send(head % (100 * MIB))
        sent = 0
        while sent < 30 and client.send(b"x" * MIB):
            sent += 1
        assert sent == 30  # no reset while it sends
        client.socket.shutdown(socket.SHUT_WR)
        response = client.rest()
    assert error(response)[0] == 413
    assert b"connection: close" in response


def test_connections_beyond_the_limit_get_503_and_leave_the_others_alone(tmp_path: Path) -> None:
    with gateway(tmp_path, max_connections=2) as running:
        with Client(running.port) as first, Client(running.port) as second:
            for client in (first, second):
                client.send(MODELS + MODELS[:-2])
                client.until(b"}]}")  # so the gateway has the second request's beginning: the connection is not idle
            response = talk(running.port, MODELS)
            assert error(response) == (
                503,
                {
                    "message": "The gateway has 2 connections, which is its limit. Retry in 5 s.",
                    "type": "service_unavailable_error",
                    "param": None,
                    "code": "too_many_connections",
                },
            )
            assert b"retry-after: 5\r\n" in response
            first.send(MODELS[-2:])
            first.until(b"}]}")
        until(
            lambda: talk(running.port, MODELS.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")).endswith(b"}]}"),
            20,
        )
        assert "refused 1 connections with 503: max_connections is 2" in running.errors.read_text()


def test_a_new_connection_takes_the_place_of_the_one_that_is_idle_for_longest(tmp_path: Path) -> None:
    with gateway(tmp_path, max_connections=3) as running, contextlib.ExitStack() as open_clients:
        idle, kept, busy = (open_clients.enter_context(Client(running.port)) for _ in range(3))
        for client in (idle, kept, busy):
            client.send(MODELS)
            client.until(b"}]}")
        busy.send(MODELS[:-2])
        kept.send(MODELS)  # now the other one is idle for longer
        kept.until(b"}]}")
        with Client(running.port) as new:
            new.send(MODELS)
            new.until(b"}]}")
            assert idle.rest() == b""
            kept.send(MODELS)
            kept.until(b"}]}")
            busy.send(MODELS[-2:])
            busy.until(b"}]}")
        for _ in range(300):  # a flood of strangers keeps nobody out
            client = open_clients.enter_context(Client(running.port))
            client.send(MODELS)
            client.until(b"}]}")
        assert psutil.Process(running.process.pid).num_fds() < 100
        assert "refused" not in running.errors.read_text()


def test_idle_connections_that_are_still_sending_are_passed_over() -> None:
    class Transport:
        def __init__(self, unsent: int) -> None:
            self.unsent, self.closed = unsent, False

        def get_write_buffer_size(self) -> int:
            return self.unsent

        def close(self) -> None:
            self.closed = True

    sending, free = Transport(1), Transport(0)
    idle = IdleConnections()
    for transport in (sending, free):
        idle.add(transport)  # type: ignore[arg-type]
    assert idle.close_one()
    assert (sending.closed, free.closed) == (False, True)
    assert not idle.close_one()
    many = [Transport(0) for _ in range(2 * MOST_CLOSING)]
    idle = IdleConnections()
    for transport in many:
        idle.add(transport)  # type: ignore[arg-type]
    while idle.close_one():
        pass
    assert sum(transport.closed for transport in many) == MOST_CLOSING  # each holds its file until it is closed
    idle.remove(many[0])  # type: ignore[arg-type]
    assert idle.close_one()


def test_a_body_of_tiny_chunks_takes_a_time_in_proportion() -> None:
    exchange: Any = Exchange.__new__(Exchange)
    exchange.body = b""
    began = time.process_time()
    for _ in range(500_000):
        exchange.add(b"x")
    assert time.process_time() - began < 5  # 10 s and more if each byte copied those before it
    assert bytes(exchange.body) == b"x" * 500_000


def test_half_requests_take_no_file_that_the_gateway_needs(tmp_path: Path) -> None:
    with gateway(tmp_path, files=256, head_timeout_s=3) as running, contextlib.ExitStack() as open_clients:
        assert "max_connections is 128 instead of 4096: this process may open 256 files" in running.errors.read_text()
        known = open_clients.enter_context(Client(running.port))
        known.send(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{")
        half = [open_clients.enter_context(Client(running.port)) for _ in range(400)]
        for client in half:
            client.send(b"GET / HTTP/1.1\r\nx: ")
        known.send(b"}")
        known.until(b'"missing_model"}}')
        assert psutil.Process(running.process.pid).num_fds() < 256 - RESERVED_FILES // 4
        statuses = sorted(client.rest()[9:12] for client in half)
        assert statuses.count(b"408") >= 127
        assert statuses.count(b"408") + statuses.count(b"503") == 400
        until(lambda: talk(running.port, b"GET /v1/models HTTP/1.1\r\n" + HEAD).endswith(b"}]}"))


def test_a_deadline_that_is_less_than_a_timer_away_can_be_moved() -> None:
    async def work() -> float:
        loop, passed = asyncio.get_running_loop(), asyncio.Event()
        deadline = Deadline(loop, passed.set)
        for seconds in (0.0001, 0.0002, 0.0001, 60, 0.05):
            deadline.set(seconds)
        began = loop.time()
        await asyncio.wait_for(passed.wait(), 20)
        return loop.time() - began

    for run in (asyncio.run, uvloop.run):
        assert run(work()) > 0.04


def test_files_for_connections() -> None:
    assert connections_for(4096, 20_000) == 4096
    assert connections_for(4096, 1024) == 1024 - RESERVED_FILES
    assert connections_for(4096, 64) == 32


def test_the_default_keeps_connections_longer_than_go_clients() -> None:
    assert Policy().keep_alive_s > 90


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


def test_uvicorn_has_the_methods_and_attributes_that_the_connection_changes() -> None:
    """A change of uvicorn that renames one of them would switch a bound off without an error."""
    overridden = {
        name
        for name in vars(Connection)
        if callable(getattr(Connection, name)) and (not name.startswith("_") or name == "__init__")
    }
    assert overridden <= set(dir(httptools_impl.HttpToolsProtocol))
    source = Path(httptools_impl.__file__).read_text()
    for name in (
        *("cycle", "flow", "pipeline", "parser", "url", "headers", "scope", "expect_100_continue", "server_state"),
        *("body", "more_body", "disconnected", "message_event", "waiting_for_100_continue", "keep_alive", "transport"),
        *("response_started", "response_complete", "chunked_encoding", "expected_content_length", "on_response"),
    ):
        assert f"        self.{name}" in source, name
    for line in (
        "self.flow.pause_reading()\n            self.pipeline.appendleft((self.cycle, app))",
        "if not self.keep_alive:\n                    self.transport.close()\n                self.on_response()",
        "if self.chunked_encoding is None and",
        "if num_bytes > self.expected_content_length:",
        "if not self.disconnected and not self.response_complete:\n            self.flow.resume_reading()",
        "if len(self.cycle.body) > HIGH_WATER_LIMIT:\n            self.flow.pause_reading()",
    ):
        assert line in source, line
