"""The frame protocol between gateway and replica: one connection that multiplexes the requests of all clients.

An engine produces one token for each of its requests in every step. With a connection per request each token would cost
a system call and a wakeup on both sides; on a shared connection the tokens of a step are sent in one write.

A frame is its payload's length (4 bytes), the number of its request (4), a kind (1), and the payload. The gateway
assigns the request numbers.
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
    """Type of a frame: the gateway sends HELLO to RESUME, the replica the others."""

    HELLO = 0
    """The token. It must be the first frame of a connection; otherwise the replica closes it."""
    OPEN = 1
    """A request: head and complete body, see `pack_request`."""
    CANCEL = 2
    """The client has disconnected."""
    PAUSE = 3
    """The client reads slowly: send no more of this response until RESUME."""
    RESUME = 4
    ANSWER = 5
    """Status and headers, see `pack_head`."""
    DATA = 6
    """A piece of the body."""
    END = 7
    """The response is complete."""
    FAILED = 8
    """The response ends here, incomplete."""


def frame(kind: Kind, number: int, payload: bytes = b"") -> bytes:
    """An encoded frame."""
    return _FRAME.pack(len(payload), number, kind) + payload


class Frames:
    """Splits a byte stream into frames."""

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
        """Length of the incomplete frame, as far as its header is known."""
        return self._wanted


def pack_head(first: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A first line and headers, one per line; headers that contain a line break are dropped."""
    lines = [name + b":" + value for name, value in headers]
    return b"\n".join([first, *(line for line in lines if b"\n" not in line)])


def unpack_head(head: bytes) -> tuple[bytes, Headers]:
    """The inverse of `pack_head`."""
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
