"""Payloads of the frames between gateway and replica: handshake, heads, requests. docs/wire.md describes them."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterable, Iterator
from typing import Final

from quantserve.serve.transport.frames import MAX_PAYLOAD, VERSION, Bytes, Headers, Kind, ProtocolError

SAME: Final = "run the same version of quantserve on both"
"""The fix when versions differ."""
MAX_HEAD: Final = 2 << 20
"""Largest request line with headers, in bytes."""
MAX_BODY: Final = 1 << 30
"""Largest request body, in bytes."""
MAX_WINDOW: Final = 1 << 30
"""Most bytes of a response that may be granted at one time."""

_HELLO: Final = struct.Struct("!4sBI")
_OPEN: Final = struct.Struct("!III")
_NUMBER: Final = struct.Struct("!I")
_MAGIC: Final = b"QSRV"
_SILENCE_S: Final = (0.1, 3600.0)
_METHOD: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}")
_STATUS: Final = re.compile(rb"[2-5][0-9]{2}")


def pack_hello(silence_s: float, token: bytes, version: int = VERSION) -> bytes:
    """The payload of HELLO. All versions keep this layout.

    Args:
        silence_s: after so many seconds without a sign of life the connection counts as lost, at both ends.
    """
    return _HELLO.pack(_MAGIC, version, round(silence_s * 1000)) + token


def unpack_hello(payload: bytes) -> tuple[int, float, bytes]:
    """Version, timeout in seconds and token.

    Raises:
        ProtocolError: it is not a HELLO.
    """
    if len(payload) < _HELLO.size or not payload.startswith(_MAGIC):
        raise ProtocolError("HELLO without magic and version")
    _, version, milliseconds = _HELLO.unpack_from(payload)
    low, high = _SILENCE_S
    return version, min(high, max(low, milliseconds / 1000)), payload[_HELLO.size :]


def pack_welcome(version: int = VERSION) -> bytes:
    """The payload of WELCOME. All versions keep this layout."""
    return _MAGIC + bytes([version])


def unpack_welcome(payload: bytes) -> int:
    """The version in WELCOME.

    Raises:
        ProtocolError: it is not a WELCOME.
    """
    if len(payload) != len(_MAGIC) + 1 or not payload.startswith(_MAGIC):
        raise ProtocolError("WELCOME without magic and version")
    return payload[-1]


def pack_number(number: int) -> bytes:
    """The payload of CREDIT."""
    return _NUMBER.pack(number)


def unpack_number(payload: bytes) -> int:
    """The inverse of `pack_number`.

    Raises:
        ProtocolError: it is not 4 bytes.
    """
    if len(payload) != _NUMBER.size:
        raise ProtocolError(f"a number of {len(payload)} bytes instead of {_NUMBER.size}")
    return int(_NUMBER.unpack(payload)[0])


def pack_head(first: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A first line and headers, one per line; headers that contain a line break are dropped.

    Raises:
        ValueError: the first line contains a line break.
    """
    if b"\n" in first:
        raise ValueError("a line break in the first line of a head")
    lines = [name + b":" + value for name, value in headers]
    return b"\n".join([first, *(line for line in lines if b"\n" not in line)])


def unpack_head(head: bytes) -> tuple[bytes, Headers]:
    """The inverse of `pack_head`.

    Raises:
        ProtocolError: a line is not a header.
    """
    first, *lines = head.split(b"\n")
    headers = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon:
            raise ProtocolError("a header without a colon")
        headers.append((name, value))
    return first, headers


def pack_answer(status: int, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The payload of ANSWER.

    Raises:
        ValueError: the gateway would refuse it: the status is not from 200 to 599, or the head is too large.
    """
    head = pack_head(b"%d" % status, headers)
    if not 200 <= status <= 599 or len(head) > MAX_PAYLOAD:
        raise ValueError(f"a response with status {status} and a head of {len(head)} bytes (at most {MAX_PAYLOAD})")
    return head


def unpack_answer(head: bytes) -> tuple[int, Headers]:
    """Status and headers of ANSWER.

    Raises:
        ProtocolError: the status is not a number from 200 to 599, or a line is not a header.
    """
    status, headers = unpack_head(head)
    if not _STATUS.fullmatch(status):
        raise ProtocolError("a status that is not a number from 200 to 599")
    return int(status), headers


def pieces(data: Bytes, size: int = MAX_PAYLOAD) -> Iterator[memoryview]:
    """Cut `data` without copying it."""
    view = memoryview(data)
    for start in range(0, len(view), size):
        yield view[start : start + size]


def pack_request(head: bytes, body: bytes, window: int) -> Iterator[tuple[Kind, Bytes]]:
    """The frames of a request: an OPEN, then as many BODY as are needed.

    Args:
        head: method and target as first line, and headers; see `pack_head`.
        window: bytes of the response that the replica may send before the first CREDIT.

    Raises:
        ValueError: the replica would refuse it: the method is malformed, or head or body is too large.
    """
    if len(head) > MAX_HEAD or len(body) > MAX_BODY or not _METHOD.fullmatch(head.partition(b" ")[0]):
        raise ValueError(f"a request with a malformed method, a head of {len(head)} or a body of {len(body)} bytes")
    start = _OPEN.pack(len(head), len(body), window)
    if len(start) + len(head) + len(body) <= MAX_PAYLOAD:
        yield Kind.OPEN, start + head + body
        return
    room = MAX_PAYLOAD - len(start)
    yield Kind.OPEN, start + head[:room]
    for part in (head[room:], body):
        for piece in pieces(part):
            yield Kind.BODY, piece


class RequestReader:
    """Assembles a request from the payloads of its frames.

    Args:
        payload: of OPEN.

    Attributes:
        window: bytes of the response that may be sent before the first CREDIT.

    Raises:
        ProtocolError: a length is wrong.
    """

    def __init__(self, payload: bytes) -> None:
        if len(payload) < _OPEN.size:
            raise ProtocolError("an OPEN that is too short")
        self._head_size, self._body_size, self.window = _OPEN.unpack_from(payload)
        if self._head_size > MAX_HEAD or self._body_size > MAX_BODY or self.window > MAX_WINDOW:
            raise ProtocolError(
                f"a request with a head of {self._head_size}, a body of {self._body_size} and a window of "
                f"{self.window} bytes; the limits are {MAX_HEAD}, {MAX_BODY} and {MAX_WINDOW}"
            )
        self._head = b""
        self._body = io.BytesIO()  # joins the pieces as they come, so that there is no pause at the end
        self._missing = self._head_size + self._body_size
        self.feed(payload[_OPEN.size :])

    def feed(self, payload: bytes) -> None:
        """Take the next piece.

        Raises:
            ProtocolError: it is longer than the rest of the request.
        """
        self._missing -= len(payload)
        if self._missing < 0:
            raise ProtocolError("a request longer than its declared length")
        if missing := self._head_size - len(self._head):
            self._head += payload[:missing]
            payload = payload[missing:]
        self._body.write(payload)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return not self._missing

    def request(self) -> tuple[str, bytes, Headers, bytes]:
        """Method, target, headers and body of a complete request.

        Raises:
            ProtocolError: the head is malformed.
        """
        first, headers = unpack_head(self._head)
        method, _, target = first.partition(b" ")
        if not _METHOD.fullmatch(method):
            raise ProtocolError("a malformed method")
        return method.decode(), target, headers, self._body.getvalue()
