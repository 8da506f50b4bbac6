"""Small pieces of ASGI: reading a body once, and errors in OpenAI's envelope."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
"""``error.type`` by status; other 4xx are ``invalid_request_error``, other 5xx ``server_error``."""

logger = logging.getLogger(__name__)


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: for the client: what is wrong and what is known.
        param: the offending field of the body.
        code: OpenAI's machine-readable code.
        headers: further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.error = {"message": message, "type": error_type(status), "param": param, "code": code}

    @property
    def response(self) -> JSONResponse:
        """The answer, in OpenAI's error envelope."""
        return JSONResponse({"error": self.error}, self.status, self.headers)


class Disconnected(Exception):
    """The client left before its request was read."""


def error_type(status: int) -> str:
    """OpenAI's ``error.type`` for an HTTP status."""
    return TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


async def read_body(receive: Receive, limit: int | None = None) -> bytes:
    """Read a request body.

    Args:
        receive: where it comes from.
        limit: most bytes; None behind the `Limits` layer, which has measured it.

    Raises:
        Refused: 413, it is longer than `limit` bytes.
        Disconnected: the client left.
    """
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        chunk = message.get("body", b"")
        size += len(chunk)
        if limit is not None and size > limit:
            raise Refused(413, f"the request body is longer than {limit} bytes", code="request_too_large")
        chunks.append(chunk)
        if not message.get("more_body"):
            return b"".join(chunks) if len(chunks) > 1 else chunks[0]


def replay(body: bytes, receive: Receive) -> Receive:
    """A receive channel that gives a body already read, then whatever `receive` gives (a disconnect)."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def channel() -> Message:
        return pending.pop() if pending else await receive()

    return channel


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        Refused: 400, it is not JSON or not an object.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "it cannot be decoded"
        raise Refused(400, f"the request body is not valid JSON: {reason}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refused(400, "the request body must be a JSON object", code="invalid_json")
    return value


def request_scope(
    method: str, path: str, headers: Sequence[tuple[bytes, bytes]] = (), query: bytes = b""
) -> dict[str, Any]:
    """The ASGI scope of a request that did not come over a socket of this process."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "root_path": "",
        "headers": list(headers),
        "client": None,
        "server": None,
        "state": {},
    }


async def ask(app: ASGIApp, method: str, path: str, body: object = None) -> tuple[int, bytes]:
    """Send one request to an app in this process; returns status and whole body."""
    status, parts = 0, []
    content = b"" if body is None else json.dumps(body).encode()

    async def stay() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await app(request_scope(method, path, headers if content else ()), replay(content, stay), send)
    return status, b"".join(parts)


def header(scope: Scope, name: bytes) -> bytes:
    """The value of a request header (name in lower case), empty when absent."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return b""


def is_json(scope: Scope) -> bool:
    """Whether the request declares a JSON body, or declares nothing."""
    media_type = header(scope, b"content-type").split(b";")[0].strip().lower()
    return media_type in (b"", b"application/json") or media_type.endswith(b"+json")


class Guard:
    """The outermost layer: whatever an app raises becomes OpenAI's envelope, never a traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app; answer for it when it raises before it answered."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Disconnected:
            return
        except Refused as refused:
            if started:
                raise
            await refused.response(scope, receive, send)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if started:
                raise
            await internal_error(500).response(scope, receive, send)


def internal_error(status: int) -> Refused:
    """The error for what is our fault; it says nothing about the inside."""
    messages = {
        503: "the model is not available at the moment; try again",
        504: "the model did not answer in time",
    }
    message = messages.get(status, "internal error; the server's log has the details")
    return Refused(status, message, headers={"retry-after": "5"} if status == 503 else None)


async def answer_lifespan(receive: Receive, send: Send) -> None:
    """The lifespan protocol of an app with nothing to start or stop."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
