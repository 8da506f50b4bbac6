"""API keys: read from a file or the environment, kept as hashes, compared in constant time.

The file is checked for changes while serving, so that keys can be added and revoked without a restart.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Final

from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantserve.errors import UsageError
from quantserve.serve.asgi import Refused, header, replay
from quantserve.system.environment import API_KEYS
from quantserve.system.homes import expand

OPEN_PATHS: Final = ("/health",)
"""Paths that load balancers may request without a key; such a response has the status only."""
KEY_DIGEST: Final = "quantserve.key"
"""Where an ASGI scope holds the digest of its API key."""
FILE_CHECK_S: Final = 1.0
"""Shortest time between two checks of the keys file."""
_SHORTEST: Final = 8

logger = logging.getLogger(__name__)


class KeySet(BaseModel):
    """SHA-256 digests (hex) of API keys.

    Attributes:
        fixed: of keys from the environment, which do not change.
        file: path of a file with further keys, one per line; None without such a file.
        from_file: of the keys in that file when it was last read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fixed: tuple[str, ...] = ()
    file: str | None = None
    from_file: tuple[str, ...] = ()

    @property
    def digests(self) -> list[str]:
        """All digests; none means that no key is required."""
        return sorted({*self.fixed, *self.from_file})


def load_key_set(file: str | None) -> KeySet:
    """The API keys in `file` and in ``QUANTSERVE_API_KEYS``.

    The file has one key per line; empty lines and lines that begin with ``#`` are skipped. The variable has keys
    separated by commas or whitespace. Only digests are returned, so Ray never stores a key.

    Raises:
        UsageError: the file cannot be read or holds no key, or a key is invalid.
    """
    found = read_file(file) if file is not None else []
    given = [key for key in re.split(r"[,\s]+", os.environ.get(API_KEYS, "")) if key]
    if wrong := [number for number, key in enumerate(given, 1) if len(key) < _SHORTEST or not _usable(key)]:
        raise UsageError(_complaint(API_KEYS, wrong))
    path = str(expand(file).absolute()) if file is not None else None
    return KeySet(fixed=tuple(_digests(given)), file=path, from_file=tuple(found))


def forget_variable() -> None:
    """Remove ``QUANTSERVE_API_KEYS`` from the environment, so that Ray, replicas and plugins do not inherit it."""
    os.environ.pop(API_KEYS, None)


def read_file(file: str) -> list[str]:
    """Digests of the keys in a file.

    Raises:
        UsageError: it cannot be read or holds no key, or a key is invalid.
    """
    try:
        lines = expand(file).read_text("utf-8-sig").splitlines()  # Windows' editors write a mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        fix = "correct the path in api_keys_file (--api-keys-file), and write one key per line into that file"
        raise UsageError(f"API keys file {file}: {reason}\n  fix: {fix}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise UsageError(
            f"API keys file {file} holds no key; without keys anyone could use the API\n"
            "  fix: write one key per line, or remove api_keys_file"
        )
    if wrong := [number for number, key in enumerate(keys, 1) if len(key) < _SHORTEST or not _usable(key)]:
        raise UsageError(_complaint(f"API keys file {file}", wrong))
    return _digests(keys)


def _digests(keys: Sequence[str]) -> list[str]:
    return sorted({sha256(key.encode()).hexdigest() for key in keys})


def _usable(key: str) -> bool:
    return key.isascii() and key.isprintable() and " " not in key


def _complaint(where: str, numbers: list[int]) -> str:
    listed = ", ".join(map(str, numbers[:5]))
    reason = f"shorter than {_SHORTEST} characters or not printable ASCII without spaces"
    fix = "replace it, e.g. by the output of `openssl rand -hex 32`"
    return f"{where}: key number {listed} is {reason}\n  fix: {fix}"


class KeyFile:
    """The current keys: the fixed ones, and those of a file that is read again when it changes.

    A file that is missing, invalid or empty does not change the keys; a warning is logged once.

    Args:
        keys: the keys loaded at the start.
        clock: monotonic seconds.
    """

    def __init__(self, keys: KeySet, clock: Callable[[], float] = time.monotonic) -> None:
        self.keys = keys
        self._clock = clock
        self._digests = [bytes.fromhex(digest) for digest in keys.digests]
        self._looked = float("-inf")
        self._seen: tuple[int, ...] | str | None = None

    def digests(self) -> Sequence[bytes]:
        """Digests of the current keys."""
        if self.keys.file is not None and self._clock() - self._looked >= FILE_CHECK_S:
            self._looked = self._clock()
            self._look(self.keys.file)
        return self._digests

    def _look(self, file: str) -> None:
        try:
            status = os.stat(file)
        except OSError as error:
            if self._seen != (reason := str(error.strerror)):
                logger.warning("API keys file %s: %s; the previous keys stay valid", file, reason)
                self._seen = reason
            return
        seen = (status.st_mtime_ns, status.st_size, status.st_ino)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            found = tuple(read_file(file))
        except UsageError as error:
            logger.warning("%s; the previous keys stay valid", str(error).partition("\n")[0])
            return
        if found != self.keys.from_file:
            self.keys = self.keys.model_copy(update={"from_file": found})
            self._digests = [bytes.fromhex(digest) for digest in self.keys.digests]
            logger.warning("API keys file %s was reloaded: %d keys", file, len(found))


class ApiKeys:
    """Pure ASGI layer that requires a valid API key, as ``Authorization: Bearer KEY`` or, as Anthropic's clients send
    it, ``X-API-Key: KEY``.

    ``/health`` also works without a key, but then returns the status only, without the names of models.

    Args:
        app: the protected app.
        keys: from `load_key_set`; an empty set lets every request pass.
        public: which requests need no key and have no body.
    """

    def __init__(self, app: ASGIApp, keys: KeySet, public: Callable[[Scope], bool] | None = None) -> None:
        self.app = app
        self.public = public
        self.known = KeyFile(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the key of HTTP and WebSocket requests."""
        digests = self.known.digests()
        if not digests or scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif (key_digest := self._known(scope, digests)) is not None:
            await self.app({**scope, KEY_DIGEST: key_digest}, receive, send)
        elif self._open(scope):
            await _bare(self.app, scope, receive, send)
        elif self.public and self.public(scope):
            await self.app(scope, replay(b"", receive), send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            missing = "Missing API key. Send the header `Authorization: Bearer KEY` or `X-API-Key: KEY`."
            message = "Invalid API key." if _key(scope) else missing
            raise Refused(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _open(self, scope: Scope) -> bool:
        path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
        return scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and path in OPEN_PATHS

    def _known(self, scope: Scope, digests: Sequence[bytes]) -> bytes | None:
        """The digest of the request's key if it is valid."""
        if not (key := _key(scope)):
            return None
        given = sha256(key).digest()
        known = False
        for digest in digests:  # always all of them: constant time
            known |= hmac.compare_digest(given, digest)
        return given if known else None


def _key(scope: Scope) -> bytes:
    """The key that a request has; empty without one."""
    scheme, _, key = header(scope, b"authorization").partition(b" ")
    return (key if scheme.lower() == b"bearer" else header(scope, b"x-api-key")).strip()


async def _bare(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run the health endpoint and return its status without the model names in its body; a request body is not read."""
    code, parts = 500, []

    async def collect(message: Message) -> None:
        nonlocal code
        code = message.get("status", code)
        parts.append(message.get("body", b""))

    try:
        await app(scope, replay(b"", receive), collect)
    except Refused as refused:
        code = refused.status
    status = "ok" if code == 200 else "unavailable"
    try:
        given = json.loads(b"".join(parts))["status"]
    except (ValueError, KeyError, TypeError):
        given = status
    await JSONResponse({"status": given if isinstance(given, str) else status}, code)(scope, receive, send)
