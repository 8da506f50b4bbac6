"""How the gateway process ends: drained, at its drain timeout, and when its parent or the control of it is lost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest
from starlette.types import Receive, Scope, Send

from quantserve.serve.gateway.middleware.limits import Policy

from .replica import TOKEN, served
from .server import HANGS_S, until

MODEL = {"card": {"id": "m", "object": "model", "metadata": {}}, "route": "/m", "aliases": [], "limits": {}}


class Streams:
    """A replica in a thread that streams an event every 20 ms until `finish` is set."""

    def __init__(self) -> None:
        self.finish = threading.Event()
        self.port = 0
        threading.Thread(target=asyncio.run, args=[self._serve()], daemon=True).start()
        until(lambda: self.port > 0)

    def close(self) -> None:
        self.finish.set()
        self._loop.call_soon_threadsafe(self._done.set)

    async def _serve(self) -> None:
        self._loop, self._done = asyncio.get_running_loop(), asyncio.Event()
        async with served(self._app) as self.port:
            await self._done.wait()

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        while not self.finish.is_set():
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
            await asyncio.sleep(0.02)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


class Gateway:
    """A gateway process that the test controls directly, with one stream in progress."""

    def __init__(self, log: Path, drain_timeout_s: float = 20) -> None:
        self.log = log
        self.replica = Streams()
        listener = socket.create_server(("127.0.0.1", 0))
        self.base = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "quantserve.serve.gateway.process", str(listener.fileno())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[listener.fileno()],
        )  # fmt: skip
        listener.close()
        policy = Policy(access_log=str(log), drain_timeout_s=drain_timeout_s).model_dump(mode="json")
        self.tell({"models": [MODEL], "token": TOKEN, "policy": policy, "parent": os.getpid()})
        self.tell({"replicas": {"m": [{"id": "r", "host": "127.0.0.1", "port": self.replica.port}]}})
        assert self.process.stdout
        while json.loads(self.process.stdout.readline())["reachable"] != ["m"]:
            pass
        self.received: list[str] = []
        self._client = threading.Thread(target=self._stream, daemon=True)
        self._client.start()
        until(lambda: len(self.received) > 2)

    def _stream(self) -> None:
        body = {"model": "m", "prompt": "x", "stream": True}
        with httpx.stream("POST", f"{self.base}/v1/completions", json=body, timeout=30, trust_env=False) as answer:
            self.received.extend(line for line in answer.iter_lines() if line)

    @property
    def stdin(self) -> IO[bytes]:
        assert self.process.stdin
        return self.process.stdin

    def tell(self, message: dict[str, Any]) -> None:
        self.write(json.dumps(message).encode() + b"\n")

    def write(self, data: bytes) -> None:
        self.stdin.write(data)
        self.stdin.flush()

    def ended(self) -> int:
        """The exit code, once process and stream have ended."""
        code = self.process.wait(120)
        self._client.join(120)
        assert not self._client.is_alive()
        return code

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def close(self) -> None:
        self.replica.close()
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with suppress(OSError):
                pipe.close() if pipe else None
        self.process.wait(120)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    made: list[Gateway] = []

    def start(**arguments: Any) -> Gateway:
        made.append(Gateway(tmp_path / "access.jsonl", **arguments))
        return made[-1]

    yield start
    for gateway in made:
        gateway.close()


def test_a_drained_stream_is_complete_and_logged(make: Callable[..., Gateway]) -> None:
    gateway = make()
    gateway.tell({"drain": True})
    until(lambda: refuses(gateway.base))
    assert gateway.process.poll() is None
    gateway.replica.finish.set()
    assert gateway.ended() == 0
    assert gateway.received[-1] == "data: [DONE]"
    requests = [(line["path"], line["status"]) for line in gateway.logged() if line["path"] != "/health"]
    assert requests == [("/v1/completions", 200)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains_a_gateway_that_was_started_without_the_command(
    make: Callable[..., Gateway], number: int
) -> None:
    gateway = make()
    gateway.process.send_signal(number)
    until(lambda: refuses(gateway.base))
    gateway.replica.finish.set()
    assert gateway.ended() == 0
    assert gateway.received[-1] == "data: [DONE]"
    assert [line["path"] for line in gateway.logged() if line["path"] != "/health"] == ["/v1/completions"]


def refuses(base: str) -> bool:
    """Whether a gateway accepts no connection."""
    try:
        httpx.get(f"{base}/health", trust_env=False, timeout=HANGS_S)
    except httpx.ConnectError:
        return True
    return False


def test_at_the_drain_timeout_a_stream_ends_with_an_error_event_and_is_logged(make: Callable[..., Gateway]) -> None:
    gateway = make(drain_timeout_s=0.5)
    gateway.tell({"drain": True})
    assert gateway.ended() == 0
    assert json.loads(gateway.received[-1].removeprefix("data: "))["error"]["code"] == "shutdown"
    assert [line["path"] for line in gateway.logged()] == ["/v1/completions"]


def close_output(gateway: Gateway) -> None:
    assert gateway.process.stdout
    gateway.process.stdout.close()


def write_half(gateway: Gateway) -> None:
    gateway.write(b'{"replicas": {"m')
    gateway.stdin.close()


FAULTS: dict[str, Callable[[Gateway], object]] = {
    "end of input": lambda gateway: gateway.stdin.close(),
    "half a line": write_half,
    "not JSON": lambda gateway: gateway.write(b"{{\n"),
    "not an object": lambda gateway: gateway.write(b"[]\n"),
    "no message": lambda gateway: gateway.tell({"x": 1}),
    "a bad update": lambda gateway: gateway.tell({"replicas": {"m": [{"id": "r"}]}}),
    "nobody reads the status": close_output,
}


REPORTED = ("not JSON", "not an object", "no message", "a bad update")
"""Faults of the protocol; the others are the end of the parent."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_gateway_without_control_ends_and_streams_get_an_error(make: Callable[..., Gateway], fault: str) -> None:
    gateway = make()
    FAULTS[fault](gateway)
    assert gateway.ended() == 0
    assert json.loads(gateway.received[-1].removeprefix("data: "))["error"]["code"] == "shutdown"
    assert [line["path"] for line in gateway.logged()] == ["/v1/completions"]
    errors = gateway.process.stderr.read() if gateway.process.stderr else b""
    assert (b"control of the gateway failed" in errors) == (fault in REPORTED)


OUTPUTS: dict[str, Callable[[Path], int]] = {
    "/dev/null": lambda folder: os.open(os.devnull, os.O_WRONLY),
    "a file": lambda folder: os.open(folder / "status", os.O_WRONLY | os.O_CREAT),
    "a full disk": lambda folder: os.open("/dev/full", os.O_WRONLY),
    "a terminal": lambda folder: os.openpty()[1],
}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_gateway_serves_whatever_its_standard_output_is(output: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process, base = start_bare(listener, stdin=subprocess.PIPE, stdout=OUTPUTS[output](tmp_path))
    try:
        assert process.stdin
        policy = Policy(access_log="off").model_dump(mode="json")
        settings = {"models": [MODEL], "token": TOKEN, "policy": policy}
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        process.stdin.flush()
        until(lambda: httpx.get(f"{base}/v1/models", trust_env=False).status_code == 200)
        process.stdin.write(b'{"drain": true}\n')
        process.stdin.flush()
        assert process.wait(120) == 0
    finally:
        process.kill()
    if output == "a file":
        status = [json.loads(line) for line in (tmp_path / "status").read_text().splitlines()]
        assert status[0]["reachable"] == []


def test_a_gateway_refuses_standard_input_that_cannot_be_followed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process, _ = start_bare(listener, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert b"standard input must be a pipe" in errors


def start_bare(listener: socket.socket, **pipes: Any) -> tuple[subprocess.Popen[bytes], str]:
    """A gateway process without settings, and its address."""
    command = [sys.executable, "-m", "quantserve.serve.gateway.process", str(listener.fileno())]
    process = subprocess.Popen(command, pass_fds=[listener.fileno()], **pipes)
    return process, f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def parent() -> Iterator[tuple[subprocess.Popen[str], int, Any]]:
    """The parent of a gateway, the gateway's port and its process; a grandchild holds the pipe between them."""
    command = [sys.executable, "-m", "tests.serve.gateway_parent", "60"]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, start_new_session=True)
    assert process.stdout
    port, pid = map(int, process.stdout.readline().split())
    gateway = psutil.Process(pid)
    children = psutil.Process(process.pid).children()
    try:
        until(lambda: httpx.get(f"http://127.0.0.1:{port}/v1/models", trust_env=False).status_code == 200)
        yield process, port, gateway
    finally:
        process.kill()
        process.wait(120)
        for child in children:
            with suppress(psutil.Error):
                child.kill()


def test_a_gateway_ends_with_its_parent_although_its_pipe_stays_open(
    parent: tuple[subprocess.Popen[str], int, Any],
) -> None:
    process, port, gateway = parent
    process.kill()
    process.wait(120)
    until(lambda: not gateway.is_running() or gateway.status() == psutil.STATUS_ZOMBIE)
    socket.create_server(("127.0.0.1", port)).close()


def test_a_gateway_serves_while_its_parent_is_suspended_and_is_not_killed_then(
    parent: tuple[subprocess.Popen[str], int, Any],
) -> None:
    process, port, gateway = parent
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)  # longer than the heartbeat timeout of 3 s
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models", trust_env=False).status_code == 200
    process.send_signal(signal.SIGCONT)
    time.sleep(2)
    assert gateway.is_running()
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models", trust_env=False).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP])
def test_a_gateway_does_not_react_to_signals_of_a_group(
    parent: tuple[subprocess.Popen[str], int, Any], number: int
) -> None:
    _, port, gateway = parent
    gateway.send_signal(number)
    time.sleep(0.3)
    assert gateway.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models", trust_env=False).status_code == 200
