"""A client connection of the gateway: uvicorn's HTTP/1.1 protocol with bounds on size and time."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import unquote

import httptools
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from quantserve.serve.asgi import Refused, request_scope

if TYPE_CHECKING:
    from uvicorn._types import ASGIReceiveEvent, ASGISendEvent

    from quantserve.serve.limits import Policy

KIB: Final = 1024
HEADER_BYTES: Final = 32
"""Counted for each header beside its name and value, as HTTP/2 does, because many tiny ones cost memory too."""
FRAMING: Final = 8
"""Bytes of chunk sizes, extensions and trailers allowed for each byte of a body, beyond `max_head_kb`."""
MAX_PIPELINED: Final = 16
"""Most requests of a connection that wait for the response to an earlier one."""
LINGER_S: Final = 5.0
"""How long data is discarded after a response to an unfinished request, so that a reset does not destroy it."""

_IDLE, _HEAD, _BODY, _CLOSED = range(4)

logger = logging.getLogger(__name__)


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """The app of a request that is refused: its channel raises the reason."""
    await receive()


class Exchange(RequestResponseCycle):
    """One request and its response. A response that begins before the request has ended closes the connection.

    Attributes:
        refusal: raised to the app that waits for the body.
        unfinished: the response began before the request had ended.
    """

    refusal: Refused | None = None
    unfinished = False
    _until_close = False

    async def receive(self) -> ASGIReceiveEvent:
        """The next part of the body, or the disconnect.

        Raises:
            Refused: the rest of the body cannot be read.
        """
        if self.refusal is None:
            message = await super().receive()
        if self.refusal is not None:
            raise self.refusal
        return message

    async def send(self, message: ASGISendEvent) -> None:
        """Send a part of the response; HTTP/1.0 has no chunks, so the end of the connection ends such a body."""
        if message["type"] == "http.response.start":
            await self._start(message)
            return
        if self._until_close:
            self.expected_content_length = len(message.get("body", b""))  # type: ignore[arg-type]
        await super().send(message)

    async def _start(self, message: Any) -> None:
        headers = list(message.get("headers", ()))
        if self.scope["http_version"] == "1.0":
            headers = [(name, value) for name, value in headers if name.lower() != b"transfer-encoding"]
            if not any(name.lower() == b"content-length" for name, _ in headers):
                self._until_close, self.chunked_encoding = True, False
        self.unfinished = self.more_body
        if self.unfinished:
            headers.append((b"connection", b"close"))
        await super().send(cast("ASGISendEvent", {**message, "headers": headers}))
        if self.unfinished:
            self.keep_alive = True  # `Connection.on_response_complete` closes, later than uvicorn would


class Connection(HttpToolsProtocol):
    """A client connection.

    Args:
        policy: the limits and timeouts.
        refusals: app that answers a request whose head is refused.
        uvicorn_arguments: as uvicorn gives them to a protocol.
    """

    def __init__(self, policy: Policy, refusals: ASGIApp, **uvicorn_arguments: Any) -> None:
        super().__init__(**uvicorn_arguments)
        self.policy = policy
        self.refusals = refusals
        self.limit = policy.max_head_kb * KIB
        self.stage = self.timed = _HEAD
        self.running: RequestResponseCycle | None = None
        self.url = b""
        self.head = 0
        """Bytes of the current head: target and headers."""
        self.fed = 0
        """Bytes read since the current head, or the body after it, began; less those that a body explains."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._wait(self.policy.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the app, whose request may be an earlier one than the last that was read."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self.pipeline.clear()
        if self.running is not None and not self.running.response_complete:
            self.running.disconnected = True
            self.running.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Parse data, and bound its size and time."""
        if self.stage == _CLOSED:
            return
        if self.stage == _IDLE:
            self._unset_keepalive_if_required()
            if self.cycle.response_complete:
                self.stage, self.url = _HEAD, b""
        self.fed += len(data)
        error: Exception | None = None
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as raised:
            error = raised
        if isinstance(error, httptools.HttpParserUpgrade):
            self._without_upgrade(data[error.args[0] :])
        elif error is not None:
            self._refuse(_reason(error))
        elif self.fed > self.limit:
            self._refuse(self._too_large())
        elif self.stage != self.timed:
            self._time()

    def on_message_begin(self) -> None:
        """Begin a head."""
        if len(self.pipeline) >= MAX_PIPELINED:
            self.url = b""
            message = f"More than {MAX_PIPELINED} requests wait for a response on this connection."
            raise Refused(400, message, code="too_many_pipelined_requests")
        super().on_message_begin()
        self.stage, self.head, self.fed = _HEAD, 0, 0

    def on_url(self, url: bytes) -> None:
        """Take a part of the request target."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; trailers of a body are ignored."""
        if self.stage == _HEAD:
            super().on_header(name, value)
            self._count(len(name) + len(value) + HEADER_BYTES)

    def on_headers_complete(self) -> None:
        """Start the request, or queue it behind the one in progress."""
        scope, parser = self.scope, self.parser
        scope["method"] = parser.get_method().decode("ascii")
        if parser.should_upgrade():
            if scope["method"] == "CONNECT":
                raise Refused(405, "Method CONNECT is not allowed: this is not a proxy.", code="method_not_allowed")
            return
        version = scope["http_version"] = parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise Refused(400, f"HTTP/{version} is not supported; use HTTP/1.1.", code="invalid_http_version")
        self._set_target()
        last, self.cycle = self.cycle, self._exchange(scope)
        if version == "1.1":
            self.cycle.waiting_for_100_continue = self.expect_100_continue
            self.cycle.keep_alive = self.policy.keep_alive_s > 0 and parser.should_keep_alive()
        self.stage, self.timed, self.fed = _BODY, _IDLE, 0
        self._begin(last, self.app)

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self.fed -= (1 + FRAMING) * len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        if not self.parser.should_upgrade():
            self.stage = _IDLE
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Continue with the next request, or close after a refusal."""
        super().on_response_complete()
        if self.transport.is_closing() or not self.cycle.response_complete:
            return
        if cast(Exchange, self.cycle).unfinished:
            self._linger()
        elif self.stage == _HEAD:
            self._wait(self.policy.head_timeout_s)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self.running = cycle
        super()._start_asgi_task(cycle, app)

    def _begin(self, last: RequestResponseCycle | None, app: Any) -> None:
        if last is None or last.response_complete:
            self._start_asgi_task(self.cycle, app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, app))

    def _set_target(self) -> None:
        """Set path and query in the scope; a path always begins with a slash.

        Raises:
            Refused: 400, the request target is not valid.
        """
        path: bytes | None = b"/"
        query: bytes | None = b""
        if self.url != b"*":
            try:
                parsed = httptools.parse_url(self.url)
                path, query = parsed.path or b"/", parsed.query
            except httptools.HttpParserInvalidURLError:
                path = None
        if path is None or not path.startswith(b"/") or not self.url.isascii():
            raise Refused(400, "The request target is not valid.", code="invalid_request_target")
        text = path.decode("ascii")
        self.scope["path"] = unquote(text) if "%" in text else text
        self.scope["raw_path"] = path
        self.scope["query_string"] = query or b""

    def _count(self, size: int) -> None:
        self.head += size
        if self.head > self.limit:
            raise self._too_large()

    def _too_large(self) -> Refused:
        kib = self.policy.max_head_kb
        if self.stage == _BODY:
            message = f"The chunk extensions and trailers of the request body exceed the limit of {kib} KiB."
        else:
            message = f"Request line and headers exceed the limit of {kib} KiB."
        return Refused(431, message, code="request_header_fields_too_large")

    def _time(self) -> None:
        """Start the timer of the stage that has begun."""
        self.timed = self.stage
        if self.stage == _HEAD:
            self._wait(self.policy.head_timeout_s)
        elif self.stage == _BODY:
            self._wait(self.policy.body_timeout_s)
        else:
            self._unset_keepalive_if_required()

    def _wait(self, seconds: float) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """The timer of the current stage has ended."""
        if self.transport.is_closing():
            return
        policy, self.timed = self.policy, self.stage
        if self.flow.read_paused and self.stage != _IDLE:
            self._time()  # the client cannot send, because the app does not read
        elif self.stage == _BODY and not self.cycle.response_complete:
            message = f"The request body did not arrive within {policy.body_timeout_s:g} s."
            self._refuse(Refused(408, message, code="request_timeout"))
        elif self.stage == _HEAD and self.url:
            message = f"The request's headers did not arrive within {policy.head_timeout_s:g} s."
            self._refuse(Refused(408, message, code="request_timeout"))
        else:
            self.transport.close()

    def _refuse(self, refused: Refused) -> None:
        """Respond with an error after the responses in progress, and read no more requests."""
        stage, self.stage = self.stage, _CLOSED
        self._unset_keepalive_if_required()
        last = self.cycle
        if stage != _BODY:
            self.cycle = self._refused_request()
            self.cycle.refusal = refused
            self._begin(last, self.refusals)
        elif last.response_started:
            last.disconnected = True
            self.transport.close()
        else:
            cast(Exchange, last).refusal = refused
        self.cycle.message_event.set()

    def _exchange(self, scope: Any) -> Exchange:
        return Exchange(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=False,
            on_response=self.on_response_complete,
        )

    def _refused_request(self) -> Exchange:
        """The request whose head is refused, as far as it is known."""
        method = self.parser.get_method().decode("ascii") if self.url else "-"
        path = self.url.partition(b"?")[0].decode("latin-1")
        return self._exchange({**request_scope(method, path or "-"), "client": self.client, "server": self.server})

    def _without_upgrade(self, rest: bytes) -> None:
        """Parse a request that asks for another protocol again, as if it did not: llhttp would not read its body."""
        line = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        kept = [b"%s: %s" % pair for pair in self.headers if pair[0] not in (b"upgrade", b"http2-settings")]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join([line, *kept, b"", rest]))

    def _linger(self) -> None:
        """Close so that the client can read the response, also one that is still sending."""
        self.stage = _CLOSED
        self.transport.write_eof()
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(LINGER_S, self.transport.close)


def _reason(error: Exception) -> Refused:
    """The response to what the parser, or a callback of it, raised."""
    cause = error.__context__
    if isinstance(cause, Refused):
        return cause
    if cause is not None:
        logger.error("cannot read a request", exc_info=cause)
    return Refused(400, f"This is not a valid HTTP/1.1 request: {error}.", code="invalid_http_request")
