"""A client of raw bytes, and a gateway process without replicas."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from helpers.waiting import HANGS_S
from quantserve.serve.gateway.middleware.limits import Policy

MIB = 1 << 20
HEAD = b"host: x\r\nconnection: close\r\n\r\n"
MODELS = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"


class Client:
    """A client's socket."""

    def __init__(self, port: int, timeout: float = HANGS_S, buffer: int = 0) -> None:
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
