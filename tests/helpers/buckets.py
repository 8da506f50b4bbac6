"""A local HTTP server that stands in for S3 and for Google Cloud Storage's XML interface, well-behaved or not.

Both list with ``GET /BUCKET?list-type=2`` and serve files with ``GET /BUCKET/KEY``, ranges and ``If-Match``.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


@dataclass
class Seen:
    """One request as the server saw it."""

    path: str
    range: str | None
    authorization: str | None
    if_match: str | None
    sent: int = 0


@dataclass
class Buckets:
    """What the server serves and how it misbehaves; change it between requests.

    Attributes:
        folders: bucket -> folder with its files, at any depth.
        page: files in one answer to a listing.
        refuse: end of a path, or ``list`` -> (status, code) to answer with.
        failures: the same -> how many times to answer 503 first.
        delay: seconds before answering.
        cut_after: close the connection after so many bytes of a file's body, `cuts` times.
        redirect: answer 301 without a place, as S3 does in another region.
    """

    folders: dict[str, Path] = field(default_factory=dict)
    page: int = 1000
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    delay: float = 0.0
    cut_after: int | None = None
    cuts: int = 0
    redirect: bool = False
    endpoint: str = ""
    seen: list[Seen] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def sent(self) -> int:
        """Body bytes of files sent so far."""
        return sum(seen.sent for seen in self.seen)

    def key(self, key: str) -> list[Seen]:
        """The requests for a file."""
        return [seen for seen in self.seen if seen.path.endswith(f"/{key}")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    buckets: ClassVar[Buckets]

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        store, url = self.buckets, urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        headers = self.headers
        seen = Seen(path, headers.get("Range"), headers.get("Authorization"), headers.get("If-Match"))
        with store.lock:
            store.seen.append(seen)
        time.sleep(store.delay)
        bucket, _, key = path.strip("/").partition("/")
        name = key or "list"
        if store.redirect:
            return self.error(301, "PermanentRedirect")
        for end, (status, code) in store.refuse.items():
            if name.endswith(end):
                return self.error(status, code)
        for end in store.failures:
            if name.endswith(end) and store.failures[end] > 0:
                store.failures[end] -= 1
                return self.error(503, "SlowDown")
        if bucket not in store.folders:
            return self.error(404, "NoSuchBucket")
        if not key:
            return self.listing(bucket, query)
        file = store.folders[bucket] / key
        if not file.is_file():
            return self.error(404, "NoSuchKey")
        if seen.if_match not in (None, tag(file)):
            return self.error(412, "PreconditionFailed")
        return self.body(seen, file)

    def error(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def listing(self, bucket: str, query: dict[str, list[str]]) -> None:
        folder = self.buckets.folders[bucket]
        prefix, after = query.get("prefix", [""])[0], query.get("continuation-token", [""])[0]
        keys = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        inside = [key for key in keys if key.startswith(prefix)]
        files = [key for key in inside if "/" not in key[len(prefix) :] and key > after]
        page, more = files[: self.buckets.page], len(files) > self.buckets.page
        parts = {f"{prefix}{key[len(prefix) :].partition('/')[0]}/" for key in inside if "/" in key[len(prefix) :]}
        entries = [
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(tag(folder / key))}</ETag><Size>{(folder / key).stat().st_size}</Size></Contents>"
            for key in page
        ]
        entries += [f"<CommonPrefixes><Prefix>{escape(part)}</Prefix></CommonPrefixes>" for part in sorted(parts)]
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        self.answer(
            200,
            f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{''.join(entries)}{token}"
            "</ListBucketResult>".encode(),
        )

    def body(self, seen: Seen, file: Path) -> None:
        store, size = self.buckets, file.stat().st_size
        start, stop = 0, size
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", seen.range or ""):
            start, stop = int(asked[1]), min(size, int(asked[2]) + 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", tag(file))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        data = file.read_bytes()[start:stop]
        with store.lock:
            if store.cut_after is not None and store.cuts > 0 and len(data) > store.cut_after:
                store.cuts -= 1
                data, self.close_connection = data[: store.cut_after], True
            seen.sent += len(data)
        self.wfile.write(data)


def tag(file: Path) -> str:
    """The entity tag of a file."""
    return f'"{hashlib.md5(file.read_bytes()).hexdigest()}"'


@contextmanager
def serve_buckets() -> Iterator[Buckets]:
    """Run the server on a free port until the block ends."""
    store = Buckets()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"buckets": store}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    store.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
