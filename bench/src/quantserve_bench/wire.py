"""Parses HTTP/1.1 responses and server-sent events, with the read in which each part arrived.

A benchmark needs the arrival times. Both parsers therefore record, for every part, the number of the read in which its
last byte arrived; the caller has the time of each read.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

MAX_HEAD = 64 << 10
MAX_LINE = 4 << 10
MAX_EVENT = 16 << 20
BLANK_LINE = re.compile(rb"(?>\r\n|\r|\n){2,}")
"""End of an event; atomic, or a single CRLF would pass for two line ends."""
LINE_END = re.compile(rb"\r\n|\r|\n")


class ProtocolError(Exception):
    """The bytes are not HTTP/1.1; the message has the reason."""


class ResponseReader:
    """The framing of one response: feed it every read in order until it is `complete`.

    Attributes:
        status: HTTP status, 0 until the head is complete.
        headers: lower-case names; of a repeated header the last value.
        head_read: number of the read that completed the head.
        chunked: whether the body comes in chunks, so that its end is the zero chunk.
        keep_alive: whether the connection can take another request.
        body: pieces of the body, each with the number of its read.
        complete: whether the response has ended.
    """

    __slots__ = ("_buffer", "_left", "_parse", "body", "chunked", "complete", "head_read", "headers", "keep_alive", "status")  # fmt: skip  # noqa: E501

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.head_read = -1
        self.chunked = False
        self.keep_alive = True
        self.body: list[tuple[int, bytes]] = []
        self.complete = False
        self._buffer = b""
        self._left = 0  # bytes still to come, of the body or of the present chunk
        self._parse = self._head

    def feed(self, data: bytes, read: int) -> None:
        """Take one read.

        Raises:
            ProtocolError: it cannot be HTTP.
        """
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        while data and not self.complete:
            data = self._parse(data, read)
        if data and self.complete:
            raise ProtocolError(f"{len(data)} bytes after the end of the response")

    def end(self) -> None:
        """The connection was closed by the server: the end of a body without a length, else too early.

        Raises:
            ProtocolError: more was to come.
        """
        if self._parse == self._until_closed:
            self.complete = True
        if not self.complete:
            what = "in the middle of the response" if self.status else "before the response began"
            raise ProtocolError(f"the server closed the connection {what}")

    def _head(self, data: bytes, read: int) -> bytes:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > MAX_HEAD:
                raise ProtocolError(f"no end of the headers in {len(data)} bytes")
            self._buffer = data
            return b""
        first, *lines = data[:end].split(b"\r\n")
        version, _, rest = first.partition(b" ")
        if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
            raise ProtocolError(f"not an HTTP/1.1 response: {first[:60]!r}")
        status = int(rest[:3])
        if status < 200 and status != 101:  # 100 Continue and its kind come before the real one
            return data[end + 4 :]
        self.status = status
        for line in lines:
            name, _, value = line.partition(b":")
            self.headers[name.decode("latin-1").strip().lower()] = value.decode("latin-1").strip()
        self.head_read = read
        connection = self.headers.get("connection", "").lower()
        self.keep_alive = "close" not in connection and (version != b"HTTP/1.0" or "keep-alive" in connection)
        self._choose_body()
        return data[end + 4 :]

    def _choose_body(self) -> None:
        length = self.headers.get("content-length", "")
        if self.status in (204, 304):
            self.complete = True
        elif "chunked" in self.headers.get("transfer-encoding", "").lower():
            self.chunked = True
            self._parse = self._chunk_size
        elif length:
            if not length.isdigit():
                raise ProtocolError(f"content-length is {length!r}")
            self._left = int(length)
            self.complete = self._left == 0
            self._parse = self._with_length
        else:
            self.keep_alive = False
            self._parse = self._until_closed

    def _with_length(self, data: bytes, read: int) -> bytes:
        part = data[: self._left]
        self.body.append((read, part))
        self._left -= len(part)
        self.complete = self._left == 0
        return data[len(part) :]

    def _until_closed(self, data: bytes, read: int) -> bytes:
        self.body.append((read, data))
        return b""

    def _line(self, data: bytes) -> tuple[bytes | None, bytes]:
        """The line that `data` begins with, without its CRLF, and what follows; None while it is incomplete."""
        end = data.find(b"\r\n")
        if end >= 0:
            return data[:end], data[end + 2 :]
        if len(data) > MAX_LINE:
            raise ProtocolError(f"no end of the line in {len(data)} bytes")
        self._buffer = data
        return None, b""

    def _chunk_size(self, data: bytes, read: int) -> bytes:
        line, rest = self._line(data)
        if line is None:
            return b""
        try:
            self._left = int(line.partition(b";")[0], 16)
        except ValueError:
            raise ProtocolError(f"chunk size is {line[:20]!r}") from None
        self._parse = self._chunk if self._left else self._trailer
        return rest

    def _chunk(self, data: bytes, read: int) -> bytes:
        part = data[: self._left]
        self.body.append((read, part))
        self._left -= len(part)
        if not self._left:
            self._parse = self._chunk_end
        return data[len(part) :]

    def _chunk_end(self, data: bytes, read: int) -> bytes:
        if len(data) < 2:
            self._buffer = data
            return b""
        if data[:2] != b"\r\n":
            raise ProtocolError(f"a chunk is followed by {data[:2]!r}")
        self._parse = self._chunk_size
        return data[2:]

    def _trailer(self, data: bytes, read: int) -> bytes:
        line, rest = self._line(data)
        self.complete = line == b""
        return rest


class Message(NamedTuple):
    """One server-sent event.

    Attributes:
        read: number of the read in which it became complete.
        name: its ``event:``, empty without.
        data: its ``data:`` lines.
    """

    read: int
    name: bytes
    data: bytes


def messages(body: Sequence[tuple[int, bytes]]) -> list[Message]:
    """The server-sent events of a body; comments and events without data are left out.

    An event the stream ended within is kept: the caller sees whether its data makes sense.
    """
    whole = b"".join(part for _, part in body)
    ends = list(accumulate(len(part) for _, part in body))
    reads = [read for read, _ in body]
    found: list[Message] = []
    for start, end, complete in _spans(whole):
        name, data = _fields(whole[start:end])
        if data is not None:
            # `complete` is where the blank line ends: the offset of its last byte is one less.
            found.append(Message(reads[bisect_right(ends, complete - 1)], name, data))
    return found


class MessageReader:
    """The same for a reader that shows events as they come: feed it every read in order."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes, read: int) -> list[Message]:
        """The events that this read completes.

        Raises:
            ProtocolError: an event is longer than `MAX_EVENT`.
        """
        begun = max(0, len(self._buffer) - 3)  # a blank line of two CRLF may have come in part
        self._buffer += data
        found, start = [], 0
        for end in BLANK_LINE.finditer(self._buffer, begun):
            found += _message(self._buffer[start : end.start()], read)
            start = end.end()
        self._buffer = self._buffer[start:]
        if len(self._buffer) > MAX_EVENT:
            raise ProtocolError(f"an event is longer than {MAX_EVENT >> 20} MiB")
        return found

    def end(self, read: int) -> list[Message]:
        """The event that the stream ended within, if there is one."""
        rest, self._buffer = self._buffer, b""
        return _message(rest, read)


def _message(event: bytes, read: int) -> list[Message]:
    name, data = _fields(event)
    return [] if data is None else [Message(read, name, data)]


def _spans(whole: bytes) -> Iterable[tuple[int, int, int]]:
    """Start and end of each event's lines, and the end of what completes it."""
    start = 0
    if b"\r" in whole:
        for match in BLANK_LINE.finditer(whole):
            yield start, match.start(), match.start() + _second_line_end(match[0])
            start = match.end()
    else:
        while (end := whole.find(b"\n\n", start)) >= 0:
            yield start, end, end + 2
            start = end + 2
    if start < len(whole):
        yield start, len(whole), len(whole)


def _second_line_end(ends: bytes) -> int:
    first = LINE_END.match(ends)
    second = LINE_END.match(ends, first.end()) if first else None
    return second.end() if second else len(ends)


def _fields(event: bytes) -> tuple[bytes, bytes | None]:
    """``event:`` and ``data:`` of an event; data is None without one."""
    if event.startswith(b"data: ") and b"\n" not in event and b"\r" not in event:
        return b"", event[6:]
    name, data = b"", []
    for line in LINE_END.split(event):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
    return name, b"\n".join(data) if data else None
