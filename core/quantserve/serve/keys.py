"""API keys: read from a file or the environment, kept as hashes, compared in constant time."""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from quantserve.errors import UsageError
from quantserve.serve.asgi import Refused, header

VARIABLE: Final = "QUANTSERVE_API_KEYS"
OPEN_PATHS: Final = ("/health",)
"""What load balancers ask without a key; it says nothing but up or down per model."""
_SHORTEST: Final = 8


def load_keys(file: str | None) -> list[str]:
    """SHA-256 digests (hex) of the API keys in `file` and in ``QUANTSERVE_API_KEYS``; empty means no keys.

    The file has one key per line; empty lines and lines that begin with ``#`` are skipped. The variable has keys
    separated by commas or whitespace. Only the digests leave this function, so Ray never stores a key.

    Raises:
        UsageError: the file cannot be read or holds no key, or a key is unusable.
    """
    keys: list[str] = []
    if file is not None:
        try:
            lines = Path(file).expanduser().read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UsageError(f"API keys file {file}: {reason}") from None
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise UsageError(
                f"API keys file {file} holds no key, which would leave the server open\n"
                "  fix: write one key per line, or remove api_keys_file"
            )
        if wrong := [number for number, key in enumerate(keys, 1) if len(key) < _SHORTEST or not _usable(key)]:
            raise UsageError(_complaint(f"API keys file {file}", wrong))
    given = [key for key in re.split(r"[,\s]+", os.environ.get(VARIABLE, "")) if key]
    if wrong := [number for number, key in enumerate(given, 1) if len(key) < _SHORTEST or not _usable(key)]:
        raise UsageError(_complaint(VARIABLE, wrong))
    return sorted({sha256(key.encode()).hexdigest() for key in (*keys, *given)})


def _usable(key: str) -> bool:
    return key.isascii() and key.isprintable() and " " not in key


def _complaint(where: str, numbers: list[int]) -> str:
    listed = ", ".join(map(str, numbers[:5]))
    return f"{where}: key number {listed} is shorter than {_SHORTEST} characters or not printable ASCII without spaces"


class ApiKeys:
    """Pure ASGI layer that lets only requests with a known key through, as ``Authorization: Bearer KEY``.

    Args:
        app: what is protected; everything but ``/health``.
        digests: from `load_keys`; empty lets everything through.
    """

    def __init__(self, app: ASGIApp, digests: Sequence[str]) -> None:
        self.app = app
        self.digests = [bytes.fromhex(digest) for digest in digests]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the key of HTTP and WebSocket requests."""
        if not self.digests or scope["type"] == "lifespan" or self._open(scope) or self._known(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            scheme, _, key = header(scope, b"authorization").partition(b" ")
            message = (
                "the API key is not known to this server"
                if key and scheme.lower() == b"bearer"
                else "no API key given; send it as `Authorization: Bearer KEY`"
            )
            raise Refused(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _open(self, scope: Scope) -> bool:
        path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
        return scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and path in OPEN_PATHS

    def _known(self, scope: Scope) -> bool:
        scheme, _, key = header(scope, b"authorization").partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        given = sha256(key.strip()).digest()
        known = False
        for digest in self.digests:  # all of them, so that the time says nothing
            known |= hmac.compare_digest(given, digest)
        return known
