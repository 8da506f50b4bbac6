"""The gateway's HTTP server: what a client may cost before it is known, and any bytes that it may send."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import pytest

from .http_client import HEAD, MIB, MODELS, Client, Gateway, error, gateway, talk
from .server import HANGS_S, until


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
        client.socket.settimeout(HANGS_S)
        responses = client.rest()
    assert b"too_many_pipelined_requests" in responses
    assert responses.count(b"HTTP/1.1 200") < 100
    assert edge.memory - before < 8 * MIB


def test_a_bad_request_behind_another_is_answered_after_it(edge: Gateway) -> None:
    first, second, third = talk(edge.port, MODELS + b"BREW / HTTP/1.1\r\n\r\n").split(b"HTTP/1.1 ")
    assert first == b""
    assert second.startswith(b"200 ")
    assert third.startswith(b"400 ")


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
