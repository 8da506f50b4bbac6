"""How the front door and a replica talk: one connection on which all requests of all clients share the way.

An engine produces the tokens of all its requests in the same step. On a connection per request each of them would cost
a system call and a wakeup on both sides; on one connection a step's tokens travel in one piece.

A frame is its payload's length (4 bytes), the number of its request (4), a kind (1), and the payload. Requests are
numbered by the front door.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Final

Headers = list[tuple[bytes, bytes]]

_FRAME: Final = struct.Struct("!IIB")
_LENGTH: Final = struct.Struct("!I")


class Kind(IntEnum):
    """What a frame says: HELLO to RESUME come from the front door, the others from the replica."""

    HELLO = 0
    """The token; the first frame of a connection, or the replica closes it."""
    OPEN = 1
    """A request: head and whole body, see `pack_request`."""
    CANCEL = 2
    """Nobody waits for the answer any more."""
    PAUSE = 3
    """The client is slow: no more of this answer until RESUME."""
    RESUME = 4
    ANSWER = 5
    """Status and headers, see `pack_head`."""
    DATA = 6
    """A piece of the body."""
    END = 7
    """The answer is whole."""
    FAILED = 8
    """The answer breaks off here."""


def frame(kind: Kind, number: int, payload: bytes = b"") -> bytes:
    """A frame as it goes on the wire."""
    return _FRAME.pack(len(payload), number, kind) + payload


class Frames:
    """Cuts what arrives into frames, however it was split on the way."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._wanted = _FRAME.size

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Kind, number and payload of every frame that `data` completes."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._wanted:
                return
            data, self._rest = bytes(self._rest), bytearray()
        start, size = 0, len(data)
        self._wanted = _FRAME.size
        while size - start >= _FRAME.size:
            length, number, kind = _FRAME.unpack_from(data, start)
            end = start + _FRAME.size + length
            if end > size:
                self._wanted = end - start
                break
            yield kind, number, data[start + _FRAME.size : end]
            start = end
        if start < size:
            self._rest += data[start:]

    @property
    def wanted(self) -> int:
        """Length of the frame that is not complete yet, as far as it is known."""
        return self._wanted


def pack_head(first: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A first line and headers, one per line; a header that has a line break in it is left out."""
    lines = [name + b":" + value for name, value in headers]
    return b"\n".join([first, *(line for line in lines if b"\n" not in line)])


def unpack_head(head: bytes) -> tuple[bytes, Headers]:
    """What `pack_head` put together."""
    first, *lines = head.split(b"\n")
    headers = []
    for line in lines:
        name, _, value = line.partition(b":")
        headers.append((name, value))
    return first, headers


def pack_request(method: str, target: bytes, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> bytes:
    """The payload of OPEN.

    Args:
        target: raw path and query.
    """
    head = pack_head(method.encode() + b" " + target, headers)
    return _LENGTH.pack(len(head)) + head + body


def unpack_request(payload: bytes) -> tuple[str, bytes, Headers, bytes]:
    """Method, target, headers and body."""
    (length,) = _LENGTH.unpack_from(payload)
    first, headers = unpack_head(payload[_LENGTH.size : _LENGTH.size + length])
    method, _, target = first.partition(b" ")
    return method.decode(), target, headers, payload[_LENGTH.size + length :]
