"""Small pieces of ASGI: reading a body once, and errors in OpenAI's envelope."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantserve.text import harmless

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
"""``error.type`` by status; other 4xx are ``invalid_request_error``, other 5xx ``server_error``."""

JSON_KEY = "quantserve.json"
"""Where an ASGI scope holds fields of its JSON body, so that no later layer parses it again."""

logger = logging.getLogger(__name__)


class Refused(Exception):
    """A request that gets an error response.

    Args:
        status: HTTP status.
        message: for the client: what is wrong, and the fix.
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
        """The response, in OpenAI's error envelope."""
        return JSONResponse({"error": self.error}, self.status, self.headers)


class Disconnected(Exception):
    """The client disconnected before its request was read."""


class Incomplete(Exception):
    """A response that has begun and cannot be completed; the server closes the connection."""


def error_type(status: int) -> str:
    """OpenAI's ``error.type`` for an HTTP status."""
    return TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


async def read_body(receive: Receive) -> bytes:
    """Read a request body; the `Limits` layer has checked its size.

    Raises:
        Disconnected: the client disconnected.
    """
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(chunks) if len(chunks) > 1 else chunks[0]


def replay(body: bytes, receive: Receive) -> Receive:
    """A receive channel that returns a body already read, then the messages of `receive` (a disconnect)."""
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
        raise Refused(400, f"The request body is not valid JSON: {reason}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refused(400, "The request body must be a JSON object.", code="invalid_json")
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
    """The value of a request header (name in lower case), empty when absent.

    In headers that begin with ``x-``, which only this server reads, ``_`` counts as ``-``: some proxies replace it.
    """
    own = name.startswith(b"x-")
    for key, value in scope["headers"]:
        if key == name or (own and key.replace(b"_", b"-") == name):
            return bytes(value)
    return b""


def is_json(scope: Scope) -> bool:
    """Whether the request declares a JSON body, or declares nothing."""
    media_type = header(scope, b"content-type").split(b";")[0].strip().lower()
    return media_type in (b"", b"application/json") or media_type.endswith(b"+json")


class Guard:
    """The outermost layer: turns exceptions of an app into OpenAI's error envelope, never into a traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app; send an error response if it raises before its response began."""
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
        except Incomplete as incomplete:
            logger.warning("%s %s: %s", scope["method"], harmless(scope["path"]), incomplete)
            raise
        except Exception:
            logger.exception("%s %s failed", scope["method"], harmless(scope["path"]))
            if started:
                raise
            await internal_error(500).response(scope, receive, send)


def internal_error(status: int) -> Refused:
    """The error for a fault of the server, without internal details."""
    messages = {
        503: "The model is temporarily unavailable. Retry in 5 s.",
        504: "The model timed out.",
    }
    message = messages.get(status, "Internal error. The server's log has the details.")
    return Refused(status, message, headers={"retry-after": "5"} if status == 503 else None)


async def answer_lifespan(
    receive: Receive, send: Send, work: Callable[[], Coroutine[Any, Any, None]] | None = None
) -> None:
    """The lifespan protocol.

    Args:
        work: runs beside the app, from its startup to its shutdown.
    """
    task: asyncio.Task[None] | None = None
    try:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup" and work is not None:
                task = asyncio.create_task(work())
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    finally:
        if task is not None:
            task.cancel()
