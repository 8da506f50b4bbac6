"""The record of one request: every layer may write to it, and observers get it when the request is complete."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantserve.serve.asgi import header

KEY: Final = "quantserve"
"""Where an ASGI scope holds its `Trace`."""
ID_HEADER: Final = b"x-request-id"
LONGEST_ID: Final = 128
LONGEST_CLIENT: Final = 64
"""Of a client's address, which a proxy on this machine sends in `X-Forwarded-For`; IPv6 needs 45 characters."""
_LONGEST_ERROR: Final = 1 << 16

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Trace:
    """The record of a request; times in seconds.

    Attributes:
        id: the client's ``x-request-id``, or one made here.
        method: HTTP method.
        path: as the client sent it, without the query.
        began: `time.perf_counter` when the request's head was read.
        client: IP address of the client.
        model: id of the requested model; empty until it is known.
        adapter: name of the requested LoRA adapter of that model, if it is one.
        quant_method: its quantization method.
        replica: id of the replica that responded.
        queued_s: time in the queue.
        attempts: number of replicas tried.
        stream: whether the client asked for a stream.
        status: HTTP status; 0 without a response.
        first_byte_s: from `began` to the first bytes of the response body.
        total_s: from `began` to the end.
        chunks: pieces of the response body.
        bytes_in: bytes read of the request body.
        bytes_out: length of the response body.
        error_code: ``error.code`` of a response with status 400 and above, if it has one.
        client_left: the client disconnected before the response was complete.
    """

    id: str
    method: str
    path: str
    began: float = field(default_factory=perf_counter)
    client: str = ""
    model: str = ""
    adapter: str = ""
    quant_method: str = ""
    replica: str = ""
    queued_s: float = 0.0
    attempts: int = 0
    stream: bool = False
    status: int = 0
    first_byte_s: float | None = None
    total_s: float | None = None
    chunks: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    error_code: str = ""
    client_left: bool = False


Observer = Callable[[Trace], None]
"""Called once per request, when it is complete; must not block."""


def trace_of(scope: Scope) -> Trace:
    """The record of a request; an unused new one if there is no `Traced` layer."""
    trace = scope.get(KEY)
    return trace if isinstance(trace, Trace) else Trace("", scope.get("method", ""), scope.get("path", ""))


class Traced:
    """Pure ASGI layer that gives every request an id and a `Trace`.

    The id is the request header ``x-request-id`` if it is 1 to 128 printable ASCII characters, else a new one. App and
    client get it in the same header. WebSockets get id and record, but are not observed.

    Args:
        app: the observed app.
        observers: called in order with the finished record; exceptions are logged and ignored.
    """

    def __init__(self, app: ASGIApp, observers: Sequence[Observer] = ()) -> None:
        self.app = app
        self.observers = tuple(observers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app on a scope with id and record, and measure its response."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        given = header(scope, ID_HEADER)
        name = given.decode() if usable(given) else uuid.uuid4().hex
        trace = Trace(name, scope.get("method", "WEBSOCKET"), scope["path"])
        trace.client = (scope.get("client") or ("",))[0][:LONGEST_CLIENT]
        id_header = (ID_HEADER, name.encode())
        headers = [pair for pair in scope["headers"] if pair[0] != ID_HEADER]
        scope = {**scope, KEY: trace, "headers": [*headers, id_header]}
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
        over = False

        async def watched_receive() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect":
                trace.client_left |= not over
            else:
                trace.bytes_in += len(message.get("body", b""))
            return message

        async def watched_send(message: Message) -> None:
            nonlocal over
            kind = message["type"]
            if kind == "http.response.body":
                size = len(message.get("body", b""))
                if size:
                    if trace.first_byte_s is None:
                        trace.first_byte_s = perf_counter() - trace.began
                        if trace.status >= 400 and not trace.error_code:
                            trace.error_code = _error_code(message["body"])
                    trace.chunks += 1
                    trace.bytes_out += size
                over = not message.get("more_body")
            elif kind == "http.response.start":
                trace.status = message["status"]
                kept = [pair for pair in message.get("headers", ()) if pair[0] != ID_HEADER]
                message = {**message, "headers": [*kept, id_header]}
            await send(message)

        try:
            await self.app(scope, watched_receive, watched_send)
        finally:
            trace.total_s = perf_counter() - trace.began
            for observer in self.observers:
                try:
                    observer(trace)
                except Exception:
                    logger.exception("a request observer failed")


def usable(name: bytes) -> bool:
    """Whether a client's request id is accepted: 1 to 128 characters of printable ASCII."""
    return 0 < len(name) <= LONGEST_ID and name.isascii() and name.decode("ascii").isprintable()


def _error_code(body: bytes) -> str:
    """``error.code`` of a response in OpenAI's envelope."""
    if len(body) > _LONGEST_ERROR or not body.startswith(b"{"):
        return ""
    try:
        error = json.loads(body)["error"]
        return str(error["code"] or "")
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
