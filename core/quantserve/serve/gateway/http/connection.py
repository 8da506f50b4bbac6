"""A client connection of the gateway: uvicorn's HTTP/1.1 protocol with bounds on size and time."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Final, cast

import httptools
from starlette.types import ASGIApp
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from quantserve.serve.asgi import Refused, request_scope
from quantserve.serve.gateway.http.exchange import Exchange, Http10Exchange, Lingering, target
from quantserve.serve.gateway.http.idle import IdleConnections
from quantserve.serve.gateway.http.timeouts import Deadline, notice_lost_client

if TYPE_CHECKING:
    from quantserve.serve.gateway.middleware.limits import Policy

KIB: Final = 1024
HEADER_BYTES: Final = 32
"""Counted for each header beside its name and value, as HTTP/2 does, because many tiny ones cost memory too."""
FRAMING: Final = 8
"""Bytes of chunk sizes, extensions and trailers allowed for each byte of a body, beyond `max_head_kb`."""
MAX_PIPELINED: Final = 16
"""Most requests of a connection that wait for the response to an earlier one."""
LINGER_S: Final = 2.0
"""How long data is discarded after a response to an unfinished request, so that a reset does not destroy it."""

_HEAD, _BODY, _READ, _IDLE, _CLOSED = range(5)
"""What a connection waits for: a head, the rest of a body, the app's response, the next request, its end."""

logger = logging.getLogger(__name__)


class Connection(HttpToolsProtocol):
    """A client connection.

    Args:
        policy: the limits and timeouts.
        refusals: app that answers a request whose head is refused.
        idle: has this connection while it waits for a further request.
        uvicorn_arguments: as uvicorn gives them to a protocol.
    """

    def __init__(self, policy: Policy, refusals: ASGIApp, idle: IdleConnections, **uvicorn_arguments: Any) -> None:
        super().__init__(**uvicorn_arguments)
        self.policy = policy
        self.refusals = refusals
        self.idle = idle
        self.limit = policy.max_head_kb * KIB
        self.stage = _HEAD
        self.timed = _HEAD
        """The stage that the deadline is for."""
        self.deadline = Deadline(self.loop, self._expired)
        self.running: RequestResponseCycle | None = None
        self.url = b""
        self.head = 0
        """Bytes of the current head: target and headers."""
        self.fed = 0
        """Bytes read since the current head, or the body after it, began; less those that a body explains."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        notice_lost_client(transport, self.policy.send_timeout_s)
        self.lingering = Lingering(transport, self._linger)
        self.deadline.set(self.policy.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the app, whose request may be an earlier one than the last that was read."""
        super().connection_lost(exc)
        self.idle.remove(self.transport)
        self.deadline.cancel()
        self.pipeline.clear()
        if self.running is not None and not self.running.response_complete:
            self.running.disconnected = True
            self.running.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Parse data, and bound its size and time."""
        if self.stage == _CLOSED:
            return
        if self.stage == _IDLE:
            self.stage, self.url = _HEAD, b""
            self.idle.remove(self.transport)
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
        self.url += url
        self.head += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; trailers of a body are ignored."""
        if self.stage == _HEAD:
            self.head += len(name) + len(value) + HEADER_BYTES
            if self.head > self.limit:
                raise self._too_large()
            name = name.lower()
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Start the request, or queue it behind the one in progress."""
        if self.head > self.limit:
            raise self._too_large()
        scope, parser = self.scope, self.parser
        scope["method"] = parser.get_method().decode("ascii")
        if parser.should_upgrade():
            if scope["method"] == "CONNECT":
                raise Refused(405, "Method CONNECT is not allowed: this is not a proxy.", code="method_not_allowed")
            return
        version = scope["http_version"] = parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise Refused(400, f"HTTP/{version} is not supported; use HTTP/1.1.", code="invalid_http_version")
        scope["path"], scope["raw_path"], scope["query_string"] = target(self.url)
        last, self.cycle = self.cycle, self._exchange(scope)
        if version == "1.1":
            self.cycle.waiting_for_100_continue = self.expect_100_continue
        self.keep_alive = version == "1.1" and self.policy.keep_alive_s > 0 and parser.should_keep_alive()
        self.stage, self.timed, self.fed = _BODY, _IDLE, 0
        self._begin(last, self.app)

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self.fed -= (1 + FRAMING) * len(body)
        cycle = cast(Exchange, self.cycle)
        cycle.add(body)
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        """End a request. Unless its response has begun, the connection may be kept for further requests."""
        if self.parser.should_upgrade():
            return
        self.stage, cycle = _READ, self.cycle
        if not cycle.response_started:
            cycle.transport = self.transport
            cycle.keep_alive = self.keep_alive
        cycle.more_body = False
        cycle.message_event.set()

    def on_response_complete(self) -> None:
        """Continue with the next request, or wait for it, or close after a response that ends the connection."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self.running, app = self.pipeline.pop()
            self._start_asgi_task(self.running, app)
            if self.stage == _CLOSED:
                return
        elif self.stage == _READ:
            self.stage = _IDLE
            self.idle.add(self.transport)
        self._time()

    def shutdown(self) -> None:
        """Close, at the latest after the response in progress."""
        self.keep_alive = False
        super().shutdown()

    def _begin(self, last: RequestResponseCycle | None, app: Any) -> None:
        if last is None or last.response_complete:
            self.running = self.cycle
            self._start_asgi_task(self.cycle, app)
        else:  # at most one more read: the app may wait for a disconnect, for which it resumes reading
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, app))

    def _too_large(self) -> Refused:
        kib = self.policy.max_head_kb
        if self.stage == _BODY:
            message = f"The chunk extensions and trailers of the request body exceed the limit of {kib} KiB."
        else:
            message = f"Request line and headers exceed the limit of {kib} KiB."
        return Refused(431, message, code="request_header_fields_too_large")

    def _time(self) -> None:
        """Set the deadline of the stage that has begun."""
        policy, self.timed = self.policy, self.stage
        if self.stage == _READ:
            self.deadline.clear()
        elif self.stage == _IDLE:
            self.deadline.set(policy.keep_alive_s)
        elif self.stage == _HEAD:
            self.deadline.set(policy.head_timeout_s)
        elif self.stage == _BODY:
            self.deadline.set(policy.body_timeout_s)
        else:
            self.deadline.set(LINGER_S)

    def _expired(self) -> None:
        if self.transport.is_closing():
            return
        if self.flow.read_paused and self.stage in (_HEAD, _BODY):
            self._time()  # the client cannot send, because the app does not read
        elif self.stage == _BODY:
            message = f"The request body did not arrive within {self.policy.body_timeout_s:g} s."
            self._refuse(Refused(408, message, code="request_timeout"))
        elif self.stage == _HEAD and self.url:
            message = f"The request's headers did not arrive within {self.policy.head_timeout_s:g} s."
            self._refuse(Refused(408, message, code="request_timeout"))
        else:
            self.transport.close()

    def _refuse(self, refused: Refused) -> None:
        """Respond with an error after the responses in progress, and read no more requests."""
        stage, self.stage = self.stage, _CLOSED
        self.deadline.clear()
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
        """An exchange that closes the connection, as long as its request has not ended."""
        return (Exchange if scope["http_version"] == "1.1" else Http10Exchange)(
            scope=scope,
            transport=cast(asyncio.Transport, self.lingering),
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
        """Close the connection when the client has, and discard what it sends until then."""
        self.stage = _CLOSED
        if not self.transport.is_closing():
            self.transport.write_eof()
            self._time()


def _reason(error: Exception) -> Refused:
    """The response to what the parser, or a callback of it, raised."""
    cause = error.__context__
    if isinstance(cause, Refused):
        return cause
    if cause is not None:
        logger.error("cannot read a request", exc_info=cause)
    return Refused(400, f"This is not a valid HTTP request: {error}.", code="invalid_http_request")
