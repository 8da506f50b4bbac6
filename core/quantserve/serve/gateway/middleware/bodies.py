"""Request bodies that the gateway holds in memory, and the limit on all of them together."""

from __future__ import annotations

from typing import Final

from starlette.types import Receive, Scope

from quantserve.serve.asgi import Disconnected, Refused, header

MIB: Final = 1 << 20
BODY_KEY: Final = "quantserve.body"
"""Where an ASGI scope holds its `Body`."""
RETRY_S: Final = 5


class Buffers:
    """Counts the bytes of all request bodies in memory.

    Args:
        limit: most bytes; a request beyond that is refused.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def hold(self, size: int) -> None:
        """Count further bytes.

        Raises:
            Refused: 503, they are beyond the limit.
        """
        if self.held + size > self.limit:
            message = (
                f"The server is busy: the request bodies in memory reach its limit of {self.limit / MIB:g} MiB. "
                f"Retry in {RETRY_S} s."
            )
            raise Refused(503, message, code="server_busy", headers={"retry-after": str(RETRY_S)})
        self.held += size


class Body:
    """A request body. It counts in `buffers` from its first byte until `release`.

    Attributes:
        content: the bytes; empty before `read` and after `release`.
    """

    def __init__(self, buffers: Buffers) -> None:
        self.content = b""
        self._buffers = buffers
        self._held = 0

    async def read(self, scope: Scope, receive: Receive, limit: int) -> None:
        """Read the whole body.

        Raises:
            Refused: 413, it is longer than `limit` bytes; 415, it is compressed; 503, all bodies are too long.
            Disconnected: the client disconnected.
        """
        coding = header(scope, b"content-encoding").strip().lower()
        if coding not in (b"", b"identity"):
            shown = coding[:40].decode("ascii", "replace")
            message = f"Content-Encoding: {shown} is not supported; send the request body uncompressed."
            raise Refused(415, message, code="unsupported_content_encoding")
        declared = header(scope, b"content-length")
        expected = int(declared[:20]) if declared.isdigit() else 0
        if expected > limit:
            raise _too_large(limit, expected)
        self._buffers.hold(expected)  # refused before it is read; counted as it arrives
        self._buffers.held -= expected
        content = bytearray()
        while True:
            received = await receive()
            if received["type"] == "http.disconnect":
                raise Disconnected
            chunk: bytes = received.get("body", b"")
            if self._held + len(chunk) > limit:
                raise _too_large(limit)
            self._buffers.hold(len(chunk))
            self._held += len(chunk)
            if not content and not received.get("more_body"):
                self.content = chunk
                return
            content += chunk
            if not received.get("more_body"):
                self.content = bytes(content)
                return

    def release(self) -> None:
        """Forget the content; further calls do nothing."""
        self._buffers.held -= self._held
        self._held, self.content = 0, b""


def release_body(scope: Scope) -> None:
    """Release the body of a request, if its scope has one: no layer needs it any more."""
    body = scope.get(BODY_KEY)
    if isinstance(body, Body):
        body.release()


def _too_large(limit: int, size: int | None = None) -> Refused:
    has = "" if size is None else f"{size} bytes, "
    message = f"Request body too large: {has}the limit is {limit} bytes ({limit / MIB:g} MiB)."
    return Refused(413, message, code="request_too_large")
