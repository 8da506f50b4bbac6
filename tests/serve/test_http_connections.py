"""The connections of the gateway's HTTP server: their number, who has to leave, files and deadlines."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import uvloop
from uvicorn.protocols.http import httptools_impl

from quantserve.serve.gateway.http.connection import Connection
from quantserve.serve.gateway.http.exchange import Exchange
from quantserve.serve.gateway.http.idle import MOST_CLOSING, IdleConnections
from quantserve.serve.gateway.http.server import RESERVED_FILES, connections_for
from quantserve.serve.gateway.http.timeouts import Deadline
from quantserve.serve.gateway.middleware.limits import Policy

from .http_client import HEAD, MODELS, Client, error, gateway, talk
from .server import until


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
        until(lambda: talk(running.port, b"GET /v1/models HTTP/1.1\r\n" + HEAD).endswith(b"}]}"))
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
