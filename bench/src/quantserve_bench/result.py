"""The result of a request: its raw bytes during the run, decoded afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, NamedTuple

from quantserve_bench.request import Request
from quantserve_bench.wire import Message, ResponseReader, messages

BODY_SHOWN: Final = 500
"""Characters of an error body that are kept."""


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
        tokens: output tokens so far, if the server reports them in every event (``continuous_usage_stats``).
    """

    at: float
    read: int
    kind: Kind
    text: str
    tokens: int | None


@dataclass(frozen=True)
class Usage:
    """The server's token counts of one request; None if it reported none."""

    prompt: int | None
    completion: int | None
    cached: int | None = None


@dataclass(frozen=True)
class Failure:
    """Why a request failed.

    Attributes:
        code: the HTTP status or the code of an error event; else one of ``refused``, ``connect``, ``tls``,
            ``connect-timeout``, ``closed``, ``reset``, ``protocol``, ``timeout``, ``stalled``, ``incomplete``,
            ``cancelled``, or one of `causes.OWN`.
        message: the server's or the system's words.
    """

    code: int | str
    message: str


@dataclass
class Result:
    """The result of one request. Times are seconds on the clock of `time.perf_counter`.

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
    _reads: list[tuple[float, bytes]] = field(default_factory=list, repr=False)
    _reader: ResponseReader | None = field(default=None, repr=False)
    _texts: list[str] = field(default_factory=list, repr=False)
    _done: bool = field(default=False, repr=False)

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
        """Decode the stored reads and free them; returns itself.

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
            self.take_answer(b"".join(part for _, part in reader.body))
        return self

    def _decode_stream(self, stream: Sequence[Message], times: Sequence[float]) -> None:
        for message in stream:
            self.take(message, times[message.read])
        self.finish()

    def take(self, message: Message, at: float) -> Event | None:
        """Add one event of the stream; None for one that shows nothing: the end, or a failure.

        Args:
            message: in the order of arrival.
            at: when it came, on the clock of `time.perf_counter`, in seconds.
        """
        if message.data.strip() == b"[DONE]":
            self._done = True
            return None
        try:
            value = json.loads(message.data)
            if value.get("error") or message.name == b"error":
                self.failure = _error_event(value)
                return None
            event = self._event(value, at, message.read)
        except (ValueError, AttributeError, TypeError, RecursionError):
            # After a failure the rest of a stream adds no information.
            said = f"an event is no JSON object of OpenAI's API: {message.data[:80]!r}"
            self.failure = self.failure or Failure("protocol", said)
            return None
        self._texts.append(event.text)
        self.events.append(event)
        return event

    def finish(self) -> None:
        """The stream has ended: join its text, and see whether it is whole."""
        self.text = "".join(self._texts)
        if self.failure is None and not self._done and self.finish_reason is None:
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

    def take_answer(self, body: bytes) -> None:
        """Decode an answer that is no stream."""
        try:
            value = json.loads(body)
            choices = value.get("choices") or ()
            if value.get("error"):
                self.failure = _error_event(value)
            for choice in choices:
                message = choice.get("message") or {}
                reasoning = message.get("reasoning") or message.get("reasoning_content") or ""
                self.text += reasoning + (message.get("content") or choice.get("text") or "")
                self.finish_reason = choice.get("finish_reason")
        except (ValueError, AttributeError, TypeError, RecursionError):
            said = f"the answer is no JSON object of OpenAI's API: {body[:80]!r}"
            self.failure = self.failure or Failure("protocol", said)
            return
        if isinstance(value.get("usage"), dict):
            self.usage = _usage(value["usage"])


def _delta(choice: Mapping[str, Any]) -> tuple[Kind, str]:
    """What one choice of an event adds."""
    delta = choice.get("delta")
    if delta is None:
        text = choice.get("text") or ""
        return (Kind.CONTENT if text else Kind.EMPTY), _text(text)
    if content := delta.get("content"):
        return Kind.CONTENT, _text(content)
    if reasoning := delta.get("reasoning") or delta.get("reasoning_content"):
        return Kind.REASONING, _text(reasoning)
    return (Kind.TOOL_CALL if delta.get("tool_calls") else Kind.EMPTY), ""


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("text is expected")
    return value


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
