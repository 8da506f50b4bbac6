"""One request and its response on a client connection of the gateway, as uvicorn passes them to the app."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import httptools
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from quantserve.serve.asgi import Refused

if TYPE_CHECKING:
    from uvicorn._types import ASGIReceiveEvent, ASGISendEvent


def target(url: bytes) -> tuple[str, bytes, bytes]:
    """Path, path before decoding, and query of a request target; a path always begins with a slash.

    Raises:
        Refused: 400, the target is not valid.
    """
    try:
        parsed = httptools.parse_url(b"/" if url == b"*" else url)
        raw = parsed.path or b"/"
        path = raw.decode("ascii")
    except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
        path = ""
    if not path.startswith("/"):
        raise Refused(400, "The request target is not valid.", code="invalid_request_target")
    return unquote(path) if "%" in path else path, raw, parsed.query or b""


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """The app of a request that is refused: its channel raises the reason."""
    await receive()


class Exchange(RequestResponseCycle):
    """One request and its response.

    Attributes:
        refusal: raised to the app that waits for the body.
    """

    refusal: Refused | None = None

    def add(self, data: bytes) -> None:
        """Add a part of the request body, which may be one byte of thousands in a chunk each."""
        body: Any = self.body
        if body and isinstance(body, bytes):
            body = bytearray(body)
        body += data
        self.body = body

    async def receive(self) -> ASGIReceiveEvent:
        """The next part of the body, or the disconnect.

        Raises:
            Refused: the rest of the body cannot be read.
        """
        if self.refusal is None:
            message = await super().receive()
        if self.refusal is not None:
            raise self.refusal
        if message["type"] == "http.request":
            message["body"] = bytes(message["body"])
        return message


class Http10Exchange(Exchange):
    """An exchange with an HTTP/1.0 client, which knows no chunks: the end of the connection ends the body."""

    sized = False

    async def send(self, message: ASGISendEvent) -> None:
        """Send a part of the response."""
        if message["type"] == "http.response.start":
            headers = [(name.lower(), value) for name, value in message.get("headers", ())]
            headers = [(name, value) for name, value in headers if name != b"transfer-encoding"]
            self.sized = b"content-length" in dict(headers)
            if not self.sized:
                self.chunked_encoding = False
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body" and not self.sized:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


class Lingering:
    """The transport of a response that begins before its request has ended: it closes without a reset.

    A reset would destroy the response on its way to a client that is still sending.
    """

    def __init__(self, transport: asyncio.Transport, linger: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = linger
