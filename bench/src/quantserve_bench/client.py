"""An HTTP client for OpenAI-compatible servers that records the arrival time of every token at little cost.

During a stream each read is stored with its time and not decoded; the framing is parsed only when a read may be the
last. The answers are decoded after the run (`Result.decode`).
"""

from __future__ import annotations

import asyncio
import re
import ssl
from dataclasses import dataclass, field
from math import inf
from time import perf_counter
from typing import Final, cast

from quantserve.errors import one_line
from quantserve_bench.causes import connect_failure
from quantserve_bench.request import Request, Target
from quantserve_bench.result import Failure, Result
from quantserve_bench.wire import ProtocolError, ResponseReader

END: Final = b"\r\n\r\n"
"""End of a chunked body; other reads may end like this too, so the framing is parsed then."""
CONTENT: Final = re.compile(rb'"(?:content|text|reasoning|reasoning_content)" ?: ?"[^"]')
CONNECT_TIMEOUT_S: Final = 10.0


@dataclass
class Live:
    """Counters of a running load, for a display.

    Attributes:
        sent, finished, failed: requests.
        events: approximate number of events with text so far, counted by ``data:`` lines.
        first_tokens: seconds from start to first text of the requests so far.
    """

    sent: int = 0
    finished: int = 0
    failed: int = 0
    events: int = 0
    first_tokens: list[float] = field(default_factory=list)

    @property
    def in_flight(self) -> int:
        """Requests in flight."""
        return self.sent - self.finished


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time.

    Args:
        live: counters to update.
    """

    def __init__(self, live: Live) -> None:
        self._live = live
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._reader = ResponseReader()
        self._reads: list[tuple[float, bytes]] = []
        self._fed = 0
        self._chunked = False
        self._seen_content = False
        self._began = 0.0
        self._deadline = 0.0
        self._stall_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def usable(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(
        self, result: Result, wire: bytes, timeout_s: float | None, stall_s: float | None
    ) -> Failure | None:
        """Send a request and wait for the end of its response; the bytes go into `result`.

        Returns:
            A failure of the transport; the response itself is checked by `Result.decode`.
        """
        assert self._transport is not None
        self._reader = result._reader = ResponseReader()
        self._reads = result._reads = []
        self._fed, self._chunked, self._seen_content = 0, False, False
        self._began = result.start
        self._deadline = result.start + timeout_s if timeout_s else inf
        self._stall_s = stall_s
        self._done = self._loop.create_future()
        self._watch(perf_counter())
        failure = None
        self._transport.write(wire)
        try:
            await self._done
        except _Ended as ended:
            failure = ended.failure
            self.close()
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._done = None
            if self._timer:
                self._timer.cancel()
        if not self._reader.keep_alive:
            self.close()
        return failure

    def close(self) -> None:
        """Abort the connection."""
        if self._transport:
            self._transport.abort()

    # --- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no instances of it

    def data_received(self, data: bytes) -> None:
        """Store a read with its time; parse the framing only if it may be the last."""
        now = perf_counter()
        self._reads.append((now, data))
        if not self._seen_content:
            self._look_for_content(now, data)
        self._live.events += data.count(b"data:")
        if self._chunked and len(data) >= len(END) and not data.endswith(END):
            return
        self._advance()

    def connection_lost(self, error: Exception | None) -> None:
        """The connection was closed, during an exchange or between two."""
        self._transport = None
        if error is not None:
            self._end(Failure("reset", one_line(error)))
            return
        try:
            self._advance_reader()
            self._reader.end()
        except ProtocolError as problem:
            self._end(Failure("closed", str(problem)))
        else:
            self._end(None)

    # --- inner working

    def _advance(self) -> None:
        if self._done is None:  # data outside of an exchange
            self.close()
            return
        try:
            self._advance_reader()
        except ProtocolError as problem:
            self._end(Failure("protocol", str(problem)))
            return
        self._chunked = self._reader.chunked
        if self._reader.complete:
            self._end(None)

    def _advance_reader(self) -> None:
        while self._fed < len(self._reads):
            self._fed += 1
            self._reader.feed(self._reads[self._fed - 1][1], self._fed - 1)

    def _end(self, failure: Failure | None) -> None:
        if self._done is not None and not self._done.done():
            if failure:
                self._done.set_exception(_Ended(failure))
            else:
                self._done.set_result(None)

    def _look_for_content(self, now: float, data: bytes) -> None:
        if CONTENT.search(data):
            self._seen_content = True
            self._live.first_tokens.append(now - self._began)

    def _watch(self, now: float) -> None:
        """Call back when a limit may be reached, if there is any."""
        due = min(self._deadline, self._last_sign + self._stall_s if self._stall_s else inf)
        self._timer = self._loop.call_later(max(0.001, due - now), self._check) if due < inf else None

    def _check(self) -> None:
        now = perf_counter()
        if now >= self._deadline:
            self._end(
                Failure(
                    "timeout", f"no complete answer within the client's timeout of {self._deadline - self._began:g} s"
                )
            )
        elif self._stall_s and now >= self._last_sign + self._stall_s:
            self._end(Failure("stalled", f"no data for {self._stall_s:g} s, the client's limit"))
        else:
            self._watch(now)

    @property
    def _last_sign(self) -> float:
        return self._reads[-1][0] if self._reads else self._began


class _Ended(Exception):
    """An exchange failed."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Client:
    """Sends requests over kept-alive connections.

    Args:
        target: the server.
        timeout_s: request timeout, including connecting; None for no timeout.
        stall_s: longest time without data within a request; None for no limit.
        live: counters to update.
    """

    def __init__(
        self, target: Target, timeout_s: float | None = None, stall_s: float | None = None, live: Live | None = None
    ) -> None:
        self.target = target
        self.live = live or Live()
        self._timeout_s = timeout_s
        self._stall_s = stall_s
        self._idle: list[Connection] = []
        self._tls = ssl.create_default_context() if target.tls else None

    async def open(self, count: int) -> None:
        """Open connections in advance; failures are ignored here and counted when a request fails."""
        opened = await asyncio.gather(*(self._connect() for _ in range(count)))
        self._idle.extend(connection for connection in opened if isinstance(connection, Connection))

    async def send(self, request: Request, wire: bytes, number: int = 0, scheduled: float | None = None) -> Result:
        """Send one request and wait for its end; failures are in the result, not raised.

        Args:
            request: goes into the result.
            wire: the request, encoded by `Request.encode`.
            number: goes into the result.
            scheduled: when it was meant to be sent; now when None.
        """
        start = perf_counter()
        result = Result(request, number, start if scheduled is None else scheduled, start)
        self.live.sent += 1
        try:
            result.failure = await self._attempt(result, wire)
        except asyncio.CancelledError:
            result.failure = Failure("cancelled", "the run was stopped")
            raise
        finally:
            # The last byte's own time: between it and here other streams may have been served.
            result.end = result._reads[-1][0] if result._reads and result.failure is None else perf_counter()
            self.live.finished += 1
            status = result._reader.status if result._reader else 0
            self.live.failed += bool(result.failure) or status != 200
        return result

    def close(self) -> None:
        """Close all connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _attempt(self, result: Result, wire: bytes) -> Failure | None:
        while True:
            connection = self._take()
            kept_alive = connection is not None
            if connection is None:
                opened = await self._connect()
                result.connect_s = perf_counter() - result.start
                if isinstance(opened, Failure):
                    return opened
                connection = opened
            failure = await connection.exchange(result, wire, self._timeout_s, self._stall_s)
            if connection.usable:
                self._idle.append(connection)
            # A server may close an idle connection just when it is used: retry on a new one.
            if kept_alive and failure and failure.code in ("closed", "reset") and not result._reads:
                continue
            return failure

    def _take(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    async def _connect(self) -> Connection | Failure:
        loop = asyncio.get_running_loop()
        limit = min(CONNECT_TIMEOUT_S, self._timeout_s or CONNECT_TIMEOUT_S)
        target = self.target
        try:
            async with asyncio.timeout(limit):
                _, connection = await loop.create_connection(
                    lambda: Connection(self.live), target.host, target.port, ssl=self._tls
                )
        except TimeoutError:
            return Failure("connect-timeout", f"cannot connect to {target.host}:{target.port} within {limit:g} s")
        except OSError as error:
            return connect_failure(target, error)
        return connection
