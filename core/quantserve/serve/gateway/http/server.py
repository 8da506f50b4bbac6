"""The gateway's HTTP server: uvicorn with bounds on what a client costs before it is known.

A request that the server refuses itself (its head, its body's framing, a timeout) gets OpenAI's error envelope and is
passed to the app's observers, so that access log and metrics have it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, cast

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from quantserve.serve.asgi import Guard, Incomplete, Refused
from quantserve.serve.gateway.http.connection import LINGER_S, Connection
from quantserve.serve.gateway.http.exchange import refuse
from quantserve.serve.gateway.http.idle import IdleConnections
from quantserve.serve.gateway.middleware.trace import Traced
from quantserve.system.open_files import raise_open_files

if TYPE_CHECKING:
    from uvicorn.server import ServerState

    from quantserve.serve.gateway.middleware.limits import Policy

RESERVED_FILES: Final = 128
"""Open files kept for replicas, logs and connections that are being refused."""
RETRY_S: Final = 5
REPORT_S: Final = 10.0
"""Shortest interval between log lines about refused connections."""

logger = logging.getLogger(__name__)


class HttpServer(uvicorn.Server):
    """A uvicorn server with the limits of a policy. It installs no signal handlers; set `should_exit` to stop it.

    Raises the soft limit of open files to the hard limit.

    Args:
        app: the public app, a `Traced` layer whose `Guard` turns `Refused` into responses.
        policy: the limits and timeouts; `drain_timeout_s` is the time for requests in progress at shutdown.
    """

    def __init__(self, app: ASGIApp, policy: Policy) -> None:
        files = raise_open_files()
        most = connections_for(policy.max_connections, files)
        if most < policy.max_connections:
            logger.warning(
                "max_connections is %d instead of %d: this process may open %d files and keeps %d for itself. "
                "Raise the hard limit (ulimit -Hn, systemd LimitNOFILE) to %d.",
                *(most, policy.max_connections, files, files - most, policy.max_connections + RESERVED_FILES),
            )

        async def complete(scope: Scope, receive: Receive, send: Send) -> None:
            with contextlib.suppress(Incomplete):  # uvicorn closes the connection, and would log a traceback
                await app(scope, receive, send)

        config = uvicorn.Config(
            complete,
            http=cast(Any, _Connections(policy, most, getattr(app, "observers", ()))),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=cast(int, policy.drain_timeout_s),  # fractions work as well
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the process's signal handlers as they are."""
        yield


def connections_for(wanted: int, files: int) -> int:
    """Most client connections with a limit of `files` open files."""
    return min(wanted, max(files - RESERVED_FILES, files // 2))


class _Connections:
    """Makes the protocol of each accepted connection: HTTP, or a short refusal beyond `most` connections.

    Beyond `most`, a new connection takes the place of an idle one, so that idle clients keep nobody out.
    """

    def __init__(self, policy: Policy, most: int, observers: Any) -> None:
        self.policy = policy
        self.most = most
        self.refusals = Traced(Guard(refuse), observers)
        self.refused: set[_TooMany] = set()
        self.idle = IdleConnections()
        self._unreported = 0
        self._reported = -REPORT_S
        message = f"The gateway has {most} connections, which is its limit. Retry in {RETRY_S} s."
        headers = {"retry-after": str(RETRY_S), "connection": "close"}
        response = Refused(503, message, code="too_many_connections", headers=headers).response
        lines = b"".join(b"%s: %s\r\n" % pair for pair in response.raw_headers)
        self.response = b"HTTP/1.1 503 Service Unavailable\r\n" + lines + b"\r\n" + bytes(response.body)

    def __call__(self, server_state: ServerState, **arguments: Any) -> asyncio.Protocol:
        """The protocol of one more connection."""
        if len(server_state.connections) >= self.most and not self.idle.close_one():
            self._report()
            return _TooMany(self)
        return Connection(self.policy, self.refusals, self.idle, server_state=server_state, **arguments)

    def _report(self) -> None:
        self._unreported += 1
        if time.monotonic() - self._reported > REPORT_S:
            logger.warning("refused %d connections with 503: max_connections is %d", self._unreported, self.most)
            self._reported, self._unreported = time.monotonic(), 0


class _TooMany(asyncio.Protocol):
    """A connection beyond the limit: gets 503 at once, and nothing it sends is read as a request."""

    def __init__(self, connections: _Connections) -> None:
        self.connections = connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Send the response and close; wait a little for the client's own close, if few others do."""
        transport.write(self.connections.response)
        if len(self.connections.refused) < RESERVED_FILES // 4:
            self.connections.refused.add(self)
            transport.write_eof()
            asyncio.get_running_loop().call_later(LINGER_S, transport.abort)
        else:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self.connections.refused.discard(self)
