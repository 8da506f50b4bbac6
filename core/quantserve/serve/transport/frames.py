"""The frame protocol between gateway and replica: one connection that multiplexes the requests of all clients.

An engine produces one token for each of its requests in every step. With a connection per request each token would cost
a system call and a wakeup on both sides; on a shared connection the tokens of a step are sent in one write.
docs/wire.md describes the protocol.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final

Headers = list[tuple[bytes, bytes]]
Bytes = bytes | memoryview

VERSION: Final = 1
"""Version of the protocol. Increase it with every change of frames or of their meaning."""
MAX_PAYLOAD: Final = 64 << 10
"""Largest payload of a frame in bytes. A longer head or body is sent in several frames."""

_FRAME: Final = struct.Struct("!IIB")
_HEADER: Final = _FRAME.size
_pack_frame = _FRAME.pack
_unpack_frame = _FRAME.unpack_from


class ProtocolError(Exception):
    """The peer violated the protocol; the message is the reason."""


class Kind(IntEnum):
    """Type of a frame. Frames of a connection have request number 0."""

    HELLO = 0
    """First frame of the gateway: version, timeout and token, see `pack_hello`."""
    WELCOME = 1
    """First frame of the replica: it accepts the connection."""
    REFUSED = 2
    """Only frame of the replica: the reason, as text; the connection closes."""
    PING = 3
    PONG = 4
    OPEN = 5
    """A request, from the gateway: its head and the beginning of its body, see `pack_request`."""
    BODY = 6
    """A further piece of the request."""
    CANCEL = 7
    """From the gateway: the client has disconnected."""
    CREDIT = 8
    """From the gateway: so many more bytes of the response may be sent."""
    ANSWER = 9
    """Status and headers, from the replica; see `pack_head`."""
    DATA = 10
    """A piece of the response body."""
    END = 11
    """The response is complete."""
    FAILED = 12
    """The response ends here, incomplete."""


DATA: Final = int(Kind.DATA)
"""`Kind.DATA` for the code that runs for each token: members of an enumeration are slow."""


def frame(kind: int, number: int, payload: Bytes = b"") -> bytes:
    """An encoded frame."""
    return _pack_frame(len(payload), number, kind) + payload


class Frames:
    """Splits a byte stream into frames.

    Attributes:
        limit: largest payload that is accepted, in bytes.
    """

    def __init__(self, limit: int = MAX_PAYLOAD) -> None:
        self.limit = limit
        self._rest = bytearray()  # an incomplete frame

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Kind, number and payload of every frame that `data` completes.

        Raises:
            ProtocolError: a frame is longer than `limit`; it is not buffered.
        """
        start, size = 0, len(data)
        if self._rest:
            start = min(size, max(0, _HEADER - len(self._rest)))
            self._rest += data[:start]
            if len(self._rest) < _HEADER:
                return
            end = start + self._missing()
            self._rest += data[start:end]
            if end > size:
                return
            start = end
            _, number, kind = _unpack_frame(self._rest)
            payload, self._rest = bytes(memoryview(self._rest)[_HEADER:]), bytearray()
            yield kind, number, payload
        while (begin := start + _HEADER) <= size:
            length, number, kind = _unpack_frame(data, start)
            if length > self.limit:
                raise ProtocolError(f"a frame of {length} bytes; the limit is {self.limit}")
            if (end := begin + length) > size:
                break
            yield kind, number, data[begin:end]
            start = end
        if start < size:
            self._rest = bytearray(data[start:])

    def _missing(self) -> int:
        """Bytes that the incomplete frame needs."""
        length, _, _ = _unpack_frame(self._rest)
        if length > self.limit:
            raise ProtocolError(f"a frame of {length} bytes; the limit is {self.limit}")
        return int(_HEADER + length - len(self._rest))
