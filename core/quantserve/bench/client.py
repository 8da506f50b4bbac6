"""An HTTP client for OpenAI-compatible servers that knows when every token came, and costs little itself.

While a stream runs, each read is stamped and put aside: nothing is decoded, and the framing is parsed only when a read
may be the last. What the server said is worked out when the run is over (`Result.decode`).
"""

from __future__ import annotations

import asyncio
import errno
import json
import re
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from time import perf_counter
from typing import Any, Final, NamedTuple, cast
from urllib.parse import urlsplit

from quantserve import __version__
from quantserve.bench.wire import Message, ProtocolError, ResponseReader, messages
from quantserve.errors import UsageError, one_line

END: Final = b"\r\n\r\n"
"""What a chunked body ends with; other reads may too, so it only asks for a closer look."""
CONTENT: Final = re.compile(rb'"(?:content|text|reasoning|reasoning_content)" ?: ?"[^"]')
CONNECT_TIMEOUT_S: Final = 10.0
BODY_SHOWN: Final = 500
"""Characters of an error body that are kept."""


@dataclass(frozen=True)
class Target:
    """Where requests go.

    Args:
        url: ``http://host:port``, with or without a path or ``/v1``; https works too.
        model: the ``model`` of each request.
        api_key: sent as a bearer token.
        headers: further headers of every request.

    Raises:
        UsageError: the URL is none.
    """

    url: str
    model: str
    api_key: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        except ValueError:
            usable = False
        if not usable:
            raise UsageError(f"{self.url!r} is not a URL\n  fix: write it as http://HOST:PORT or https://HOST/PATH/v1")

    @property
    def host(self) -> str:
        """Name or address."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """The URL's, or that of its scheme."""
        parts = urlsplit(self.url)
        return parts.port or (443 if parts.scheme == "https" else 80)

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""
        return urlsplit(self.url).scheme == "https"

    @property
    def root(self) -> str:
        """The path before ``/v1``, empty for most servers."""
        return urlsplit(self.url).path.rstrip("/").removesuffix("/v1")

    def head(self, method: str, path: str) -> bytes:
        """A request's head up to its last fixed header."""
        lines = [
            f"{method} {self.root}{path} HTTP/1.1",
            f"Host: {urlsplit(self.url).netloc.rpartition('@')[2]}",
            f"User-Agent: quantserve-bench/{__version__}",
            "Accept: text/event-stream, application/json",
            *([f"Authorization: Bearer {self.api_key}"] if self.api_key else []),
            *(f"{name}: {value}" for name, value in self.headers.items()),
        ]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n"


@dataclass(frozen=True)
class Request:
    """One request, chat with `messages` or completion with `prompt`.

    Attributes:
        messages: of a chat.
        prompt: text or token ids of a completion.
        max_tokens: cap of the answer.
        temperature: None leaves it to the server.
        ignore_eos: make the answer exactly `max_tokens` long (vLLM and relatives).
        stream: False asks for the whole answer at once; there is no TTFT then.
        extra: further keys of the body; they win.
        input_tokens: how long the workload made the prompt, in tokens; None when it did not count.
    """

    messages: Sequence[Mapping[str, Any]] | None = None
    prompt: str | Sequence[int] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    ignore_eos: bool = False
    stream: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    input_tokens: int | None = None

    @property
    def path(self) -> str:
        """The route that takes it."""
        return "/v1/completions" if self.messages is None else "/v1/chat/completions"

    def body(self, model: str) -> dict[str, Any]:
        """The JSON body."""
        body: dict[str, Any] = {"model": model, "stream": self.stream}
        if self.messages is None:
            body["prompt"] = self.prompt
        else:
            body["messages"] = self.messages
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.ignore_eos:
            body["ignore_eos"] = True
        return body | dict(self.extra)

    def encode(self, target: Target) -> bytes:
        """The request as it goes over the wire."""
        body = json.dumps(self.body(target.model), ensure_ascii=False).encode()
        head = target.head("POST", self.path)
        return b"%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (head, len(body), body)


class Kind(Enum):
    """What an event of a stream carries."""

    CONTENT = "content"
    REASONING = "reasoning"
    TOOL_CALL = "tool call"
    EMPTY = "empty"
    """Choices without text: the role that opens a chat, the finish reason that ends it, a held-back token."""
    USAGE = "usage"
    """No choices at all."""


TOKENS: Final = frozenset({Kind.CONTENT, Kind.REASONING, Kind.TOOL_CALL})
"""Kinds that show a token to the user."""


class Event(NamedTuple):
    """One event of a stream.

    Attributes:
        at: when the read that completed it came, on the clock of `time.perf_counter`, in seconds.
        read: number of that read in the response; events that came together share it.
        kind: what it carries.
        text: its content or reasoning.
        tokens: output tokens until here, where the server says so in every event (``continuous_usage_stats``).
    """

    at: float
    read: int
    kind: Kind
    text: str
    tokens: int | None


@dataclass(frozen=True)
class Usage:
    """Token counts of the server for one request; None where it did not say."""

    prompt: int | None
    completion: int | None
    cached: int | None = None


@dataclass(frozen=True)
class Failure:
    """Why a request failed.

    Attributes:
        code: the HTTP status or the code of an error event; else one of ``refused``, ``dns``, ``connect``,
            ``connect-timeout``, ``closed``, ``reset``, ``protocol``, ``timeout``, ``stalled``, ``incomplete``,
            ``cancelled``.
        message: the server's or the system's words.
    """

    code: int | str
    message: str


@dataclass
class Result:
    """What became of one request. Times are seconds on the clock of `time.perf_counter`.

    Attributes:
        request: what was sent.
        number: position in the order of sending.
        scheduled: when the load wanted it sent.
        start: when it was sent; connecting, where it was needed, comes after it.
        connect_s: how long connecting took; 0 on a connection kept alive.
        head: when the response's headers were complete.
        end: when the response, or the attempt, had ended.
        status: HTTP status.
        failure: None for a complete answer.
        retry_after_s: what the server asked to wait.
        events: the stream, in order; empty without streaming.
        usage: the server's token counts.
        text: content and reasoning together.
        finish_reason: the server's.
        warmup: set by the caller for requests outside the measurement.
    """

    request: Request
    number: int
    scheduled: float
    start: float
    connect_s: float = 0.0
    head: float | None = None
    end: float = 0.0
    status: int | None = None
    failure: Failure | None = None
    retry_after_s: float | None = None
    events: list[Event] = field(default_factory=list)
    usage: Usage | None = None
    text: str = ""
    finish_reason: str | None = None
    warmup: bool = False
    _reads: list[tuple[float, bytes]] = field(default_factory=list, repr=False)
    _reader: ResponseReader | None = field(default=None, repr=False)

    @property
    def ok(self) -> bool:
        """Whether the answer came whole."""
        return self.failure is None

    @property
    def token_times(self) -> list[float]:
        """When each event came that shows a token."""
        return [event.at for event in self.events if event.kind in TOKENS]

    @property
    def asked_to_wait_s(self) -> float:
        """Seconds the server asked to wait before the next request, 0 when it did not; known before `decode`."""
        reader = self._reader
        value = _seconds(reader.headers.get("retry-after")) if reader and reader.status != 200 else self.retry_after_s
        return value or 0.0

    @property
    def raw_bytes(self) -> int:
        """Bytes held until `decode`."""
        return sum(len(data) for _, data in self._reads)

    def decode(self) -> Result:
        """Work out from the reads what the server said, and let go of them; returns itself.

        `run` does this for every result before it returns.
        """
        reader, reads = self._reader, self._reads
        self._reader, self._reads = None, []
        if reader is None or not reader.status:
            return self
        self.status = reader.status
        self.head = reads[reader.head_read][0]
        self.retry_after_s = _seconds(reader.headers.get("retry-after"))
        if reader.status != 200:
            body = b"".join(part for _, part in reader.body)
            self.failure = Failure(reader.status, error_message(body) or f"HTTP {reader.status}")
        elif "text/event-stream" in reader.headers.get("content-type", ""):
            self._decode_stream(messages(reader.body), [at for at, _ in reads])
        else:
            self._decode_answer(b"".join(part for _, part in reader.body))
        return self

    def _decode_stream(self, stream: Sequence[Message], times: Sequence[float]) -> None:
        done = False
        texts = []
        for message in stream:
            if message.data.strip() == b"[DONE]":
                done = True
                continue
            try:
                value = json.loads(message.data)
            except ValueError:
                value = None
            if not isinstance(value, dict):
                # The torn end of a stream that failed anyway says nothing new.
                self.failure = self.failure or Failure("protocol", f"an event is no JSON object: {message.data[:80]!r}")
                continue
            if value.get("error") or message.name == b"error":
                self.failure = _error_event(value)
                continue
            event = self._event(value, times[message.read], message.read)
            texts.append(event.text)
            self.events.append(event)
        self.text = "".join(texts)
        if self.failure is None and not done and self.finish_reason is None:
            self.failure = Failure("incomplete", "the stream ended without [DONE] and without a finish reason")

    def _event(self, value: Mapping[str, Any], at: float, read: int) -> Event:
        usage = value.get("usage")
        if isinstance(usage, dict):
            self.usage = _usage(usage)
        kind, text = Kind.USAGE, ""
        for choice in value.get("choices") or ():
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            part_kind, part = _delta(choice)
            text += part
            if kind in (Kind.USAGE, Kind.EMPTY):
                kind = part_kind
        tokens = self.usage.completion if isinstance(usage, dict) and self.usage and kind is not Kind.USAGE else None
        return Event(at, read, kind, text, tokens)

    def _decode_answer(self, body: bytes) -> None:
        try:
            value = json.loads(body)
            choices = value.get("choices") or ()
            if value.get("error"):
                self.failure = _error_event(value)
        except (ValueError, AttributeError):
            self.failure = self.failure or Failure("protocol", f"the answer is no JSON object: {body[:80]!r}")
            return
        for choice in choices:
            message = choice.get("message") or {}
            reasoning = message.get("reasoning") or message.get("reasoning_content") or ""
            self.text += reasoning + (message.get("content") or choice.get("text") or "")
            self.finish_reason = choice.get("finish_reason")
        if isinstance(value.get("usage"), dict):
            self.usage = _usage(value["usage"])


def _delta(choice: Mapping[str, Any]) -> tuple[Kind, str]:
    """What one choice of an event adds."""
    delta = choice.get("delta")
    if delta is None:
        text = choice.get("text") or ""
        return (Kind.CONTENT if text else Kind.EMPTY), text
    if content := delta.get("content"):
        return Kind.CONTENT, content
    if reasoning := delta.get("reasoning") or delta.get("reasoning_content"):
        return Kind.REASONING, reasoning
    return (Kind.TOOL_CALL if delta.get("tool_calls") else Kind.EMPTY), ""


def _usage(usage: Mapping[str, Any]) -> Usage:
    details = usage.get("prompt_tokens_details") or {}
    return Usage(usage.get("prompt_tokens"), usage.get("completion_tokens"), details.get("cached_tokens"))


def _error_event(value: Mapping[str, Any]) -> Failure:
    error = value.get("error") or value
    if not isinstance(error, dict):
        return Failure("error", str(error)[:BODY_SHOWN])
    code = error.get("code")
    if isinstance(code, str) and code.isdigit():
        code = int(code)
    message = str(error.get("message") or json.dumps(error))[:BODY_SHOWN]
    return Failure(code if isinstance(code, int | str) and code else "error", message)


def error_message(body: bytes) -> str:
    """The message of an error body: OpenAI's envelope, FastAPI's detail, or its text."""
    try:
        value = json.loads(body)
    except ValueError:
        return body[:BODY_SHOWN].decode(errors="replace").strip()
    if isinstance(value, dict):
        error = value.get("error", value)
        value = error.get("message", error.get("detail", error)) if isinstance(error, dict) else error
    return (value if isinstance(value, str) else json.dumps(value))[:BODY_SHOWN]


def _seconds(value: str | None) -> float | None:
    """A Retry-After in seconds; the form with a date is not used by servers of models."""
    try:
        return max(0.0, float(value)) if value else None
    except ValueError:
        return None


@dataclass
class Live:
    """Counters that change while a load runs, for whoever shows it.

    Attributes:
        sent, finished, failed: requests.
        events: events with text seen so far, roughly: what one read brought counts by its ``data:`` lines.
        first_tokens: seconds from start to first text of the requests so far.
    """

    sent: int = 0
    finished: int = 0
    failed: int = 0
    events: int = 0
    first_tokens: list[float] = field(default_factory=list)

    @property
    def in_flight(self) -> int:
        """Requests on their way."""
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
            What went wrong on the way; what the response says is found by `Result.decode`.
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
        """Drop the connection."""
        if self._transport:
            self._transport.abort()

    # --- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are no instances of it

    def data_received(self, data: bytes) -> None:
        """Stamp a read; look closer only when it may be the last."""
        now = perf_counter()
        self._reads.append((now, data))
        if not self._seen_content:
            self._look_for_content(now, data)
        self._live.events += data.count(b"data:")
        if self._chunked and len(data) >= len(END) and not data.endswith(END):
            return
        self._advance()

    def connection_lost(self, error: Exception | None) -> None:
        """The connection is gone, in the middle of an exchange or between two."""
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
        if self._done is None:  # bytes nobody asked for
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
            self._end(Failure("timeout", f"no complete answer in {self._deadline - self._began:g} s"))
        elif self._stall_s and now >= self._last_sign + self._stall_s:
            self._end(Failure("stalled", f"nothing came for {self._stall_s:g} s"))
        else:
            self._watch(now)

    @property
    def _last_sign(self) -> float:
        return self._reads[-1][0] if self._reads else self._began


class _Ended(Exception):
    """An exchange did not come to its end."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Client:
    """Sends requests over connections that it keeps open.

    Args:
        target: where to.
        timeout_s: for a whole request, connecting included; None waits for ever.
        stall_s: longest silence within a request; None allows any.
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
        """Connect beforehand, so that no request waits for it; what fails will fail again where it is counted."""
        opened = await asyncio.gather(*(self._connect() for _ in range(count)))
        self._idle.extend(connection for connection in opened if isinstance(connection, Connection))

    async def send(self, request: Request, wire: bytes, number: int = 0, scheduled: float | None = None) -> Result:
        """Send one request, wait for its end; never raises for what goes wrong on the way.

        Args:
            request: goes into the result.
            wire: `Request.encode` of it, made beforehand.
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
        """Close what is open."""
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
            # A server may close an idle connection at the very moment it is used; that is no answer.
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
            return Failure("connect-timeout", f"no connection to {target.host}:{target.port} in {limit:g} s")
        except ConnectionRefusedError:
            return Failure("refused", f"nothing listens at {target.host}:{target.port}")
        except socket.gaierror as error:
            return Failure("dns", f"{target.host}: {error.strerror}")
        except OSError as error:
            hint = "; raise the limit of open files (ulimit -n)" if error.errno == errno.EMFILE else ""
            return Failure("connect", one_line(error) + hint)
        return connection
