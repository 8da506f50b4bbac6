"""A local HTTP server that stands in for the Hugging Face hub, well-behaved or not.

Large files are redirected to a second server (another origin), as the hub does with its content network.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Seen:
    """One request as the server saw it."""

    server: str  # "hub" or "cdn"
    path: str
    range: str | None
    authorization: str | None
    sent: int = 0


@dataclass
class Hub:
    """What the servers serve and how they misbehave; change it between requests.

    Attributes:
        repos: repository -> folder.
        status: path suffix -> (status, X-Error-Code) to answer with.
        failures: path suffix -> how many times to answer 503 first.
        ignore_ranges: answer 200 with the whole file.
        cut_after: close the connection after so many bytes of a file's body.
        cuts: how many times to do so; -1 is always.
        delay: seconds before answering.   drip: send a byte every so many seconds.
        hide_sizes: leave sizes out of the listing.   loop: redirect files to themselves.
        shift_range: answer with a range that begins so many bytes later.   garbage: answer the listing with HTML.
    """

    repos: dict[str, Path] = field(default_factory=dict)
    status: dict[str, tuple[int, str]] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    revisions: tuple[str, ...] = ("main",)
    ignore_ranges: bool = False
    cut_after: int | None = None
    cuts: int = -1
    delay: float = 0.0
    drip: float = 0.0
    hide_sizes: bool = False
    loop: bool = False
    shift_range: int = 0
    garbage: bool = False
    endpoint: str = ""
    cdn: str = ""
    seen: list[Seen] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def sent(self) -> int:
        """Body bytes sent so far."""
        return sum(seen.sent for seen in self.seen)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[Hub]
    kind: ClassVar[str]

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that has read enough hangs up
            super().handle()

    def do_GET(self) -> None:
        hub = self.hub
        path = unquote(urlsplit(self.path).path)
        seen = Seen(self.kind, path, self.headers.get("Range"), self.headers.get("Authorization"))
        with hub.lock:
            hub.seen.append(seen)
        time.sleep(hub.delay)
        for suffix, (status, code) in hub.status.items():
            if path.endswith(suffix):
                return self.answer(status, b"no", {"X-Error-Code": code})
        for suffix in hub.failures:
            if path.endswith(suffix) and hub.failures[suffix] > 0:
                hub.failures[suffix] -= 1
                return self.answer(503, b"busy")
        if listing := re.fullmatch(r"/api/models/(.+)/revision/(.+)", path):
            return self.listing(*listing.groups())
        if file := re.fullmatch(r"/(.+)/resolve/([^/]+)/(.+)", path):
            return self.file(seen, *file.groups())
        return self.answer(404, b"")

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def listing(self, repo: str, revision: str) -> None:
        if self.hub.garbage:
            return self.answer(200, b"<html>Please log in to the wireless network</html>")
        if repo not in self.hub.repos:
            return self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in (*self.hub.revisions, COMMIT):
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        siblings = [
            {"rfilename": path.name} | ({} if self.hub.hide_sizes else {"size": path.stat().st_size})
            for path in sorted(self.hub.repos[repo].iterdir())
        ]
        return self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())

    def file(self, seen: Seen, repo: str, revision: str, name: str) -> None:
        hub = self.hub
        if hub.loop:
            return self.answer(302, b"", {"Location": self.path})
        path = hub.repos[repo] / name
        if revision != COMMIT or not path.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        if self.kind == "hub" and name.endswith((".safetensors", ".pt", ".bin")):
            return self.answer(302, b"", {"Location": hub.cdn + self.path})
        return self.body(seen, path)

    def body(self, seen: Seen, path: Path) -> None:
        hub, size = self.hub, path.stat().st_size
        start, stop = 0, size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and not hub.ignore_ranges:
            start, stop = int(asked[1]) + hub.shift_range, min(size, int(asked[2]) + 1 + hub.shift_range)
            if start >= size:
                self.answer(416, b"")
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        limit = stop - start
        with hub.lock:
            if hub.cut_after is not None and hub.cuts != 0:
                limit = min(limit, hub.cut_after)
                hub.cuts -= 1
        self.stream(seen, path, start, limit)
        if limit < stop - start:
            self.close_connection = True

    def stream(self, seen: Seen, path: Path, start: int, count: int) -> None:
        with path.open("rb") as file:
            file.seek(start)
            try:
                while count > 0:
                    chunk = file.read(1 if self.hub.drip else min(count, 1 << 16))
                    if not chunk:
                        return
                    self.wfile.write(chunk)
                    seen.sent += len(chunk)
                    count -= len(chunk)
                    time.sleep(self.hub.drip)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Run both servers on free ports until the block ends."""
    hub = Hub()
    servers = []
    for kind in ("hub", "cdn"):
        handler = type(f"{kind}Handler", (_Handler,), {"hub": hub, "kind": kind})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
