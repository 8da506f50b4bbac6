"""Framing and events, however the bytes are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantserve_bench.wire import Message, ProtocolError, ResponseReader, messages

STREAM = b"data: one\n\n: a comment\n\nevent: error\ndata: two\ndata: lines\n\ndata: \xc3\xa9\n\ndata: [DONE]\n\n"
EVENTS = [(b"", b"one"), (b"error", b"two\nlines"), (b"", b"\xc3\xa9"), (b"", b"[DONE]")]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(body: bytes, sizes: list[int], trailer: bytes = b"") -> bytes:
    out = b""
    for size in sizes:
        part, body = body[:size], body[size:]
        out += b"%x;ext=1\r\n%s\r\n" % (len(part), part) if part else b""
    return out + (b"%X\r\n%s\r\n" % (len(body), body) if body else b"") + b"0\r\n" + trailer + b"\r\n"


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({place % len(data) for place in places} - {0}), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def read_all(reads: list[bytes]) -> ResponseReader:
    reader = ResponseReader()
    for number, data in enumerate(reads):
        assert not reader.complete
        reader.feed(data, number)
    return reader


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=8), st.lists(st.integers(0, 400), max_size=30), st.booleans())
def test_any_chunks_in_any_reads_give_the_same_events(sizes: list[int], places: list[int], trailer: bool) -> None:
    data = HEAD + chunked(STREAM, sizes, b"X-Sum: 1\r\n" if trailer else b"")
    reader = read_all(cut(data, places))
    assert reader.complete
    assert (reader.status, reader.chunked, reader.keep_alive) == (200, True, True)
    assert [(name, text) for _, name, text in messages(reader.body)] == EVENTS


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
@settings(deadline=None)
@given(places=st.lists(st.integers(0, 400), max_size=30))
def test_an_event_belongs_to_the_read_that_completes_it(newline: bytes, places: list[int]) -> None:
    """Against the definition: feed a byte more at a time until the event is there."""
    body = STREAM.replace(b"\n", newline)
    reads = cut(body, places)
    pieces = list(enumerate(reads))
    found = messages(pieces)
    assert [(name, text) for _, name, text in found] == EVENTS
    for position, message in enumerate(found):
        complete = [
            number for number in range(len(reads)) if whole_events(b"".join(reads[: number + 1]), newline) > position
        ]
        assert message.read == complete[0]


def whole_events(body: bytes, newline: bytes) -> int:
    """How many events are complete in the bytes so far, line by line."""
    count, data = 0, False
    for line in body.split(newline)[:-1]:
        if line.startswith(b"data:"):
            data = True
        elif not line and data:
            count, data = count + 1, False
    return count


def test_a_torn_event_at_the_end_is_kept() -> None:
    assert messages([(0, b"data: a\n\nda"), (3, b"ta: b")]) == [Message(0, b"", b"a"), Message(3, b"", b"b")]


@settings(deadline=None)
@given(st.lists(st.integers(0, 100), max_size=20))
def test_a_body_with_a_length(places: list[int]) -> None:
    data = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 429 Slow\r\nretry-after: 7\r\nConnection: close\r\nContent-Length: 5\r\n\r\nslow!"  # noqa: E501
    reader = read_all(cut(data, places))
    assert reader.complete
    assert (reader.status, reader.headers["retry-after"], reader.keep_alive) == (429, "7", False)
    assert b"".join(part for _, part in reader.body) == b"slow!"


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    reader = read_all([b"HTTP/1.0 200 OK\r\n\r\nab", b"c"])
    assert not reader.complete
    reader.end()
    assert reader.complete
    assert reader.body == [(0, b"ab"), (1, b"c")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "not an HTTP/1.1 response: b'SSH-2.0"),
        (b"HTTP/1.1 OK\r\n\r\n", "not an HTTP/1.1 response"),
        (HEAD + b"zz\r\n", "chunk size is b'zz'"),
        (HEAD + b"1\r\naXX", "a chunk is followed by b'XX'"),
        (HEAD + b"0\r\n\r\nmore", "4 bytes after the end"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "content-length is '-1'"),
        (b"HTTP/1.1 200 OK\r\n" + b"a" * 70_000, "no end of the headers in 70017 bytes"),
    ],
)
def test_bytes_that_are_not_http_are_reported(data: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message.replace("(", r"\(")):
        read_all([data])


@pytest.mark.parametrize(("data", "when"), [(b"", "before the response began"), (HEAD + b"5\r\nab", "in the middle")])
def test_a_connection_closed_too_early(data: bytes, when: str) -> None:
    with pytest.raises(ProtocolError, match=when):
        read_all([data] if data else []).end()
