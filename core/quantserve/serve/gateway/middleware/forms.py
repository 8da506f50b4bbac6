"""Reads fields of multipart forms, which vLLM's audio routes take."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Collection
from typing import Final

from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.types import Message, Receive, Scope

from quantserve.serve.asgi import Refused, header
from quantserve.serve.json_fields import LONGEST_NUMBER, integer
from quantserve.serve.routes import FORMS

PIECE: Final = 32 << 10
"""Bytes parsed at once; in between, other requests have their turn."""
logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every broken form
MULTIPART: Final = b"multipart/form-data"
_KINDS: Final = (MULTIPART, b"application/x-www-form-urlencoded")


def is_form(path: str, scope: Scope) -> bool:
    """Whether a request has a form for a route that takes forms."""
    return _media_type(scope) in _KINDS and path.endswith(tuple(FORMS))


async def read_form(scope: Scope, body: bytes, names: Collection[str]) -> dict[str, float]:
    """The numbers in the given fields, as vLLM reads them; the largest of a field given several times.

    Raises:
        Refused: 400, the form cannot be parsed; 415, it cannot hold the file that these routes require.
    """
    if _media_type(scope) != MULTIPART:
        kind = _media_type(scope).decode()
        message = f"Content-Type: {kind} is not supported here; send the audio file as {MULTIPART.decode()}."
        raise Refused(415, message, param="file", code="unsupported_media_type")
    try:
        async with Request(scope, _in_pieces(body)).form() as form:
            return {name: max(_number(value) for value in form.getlist(name)) for name in names if name in form}
    except (MultiPartException, HTTPException) as error:
        reason = error.message if isinstance(error, MultiPartException) else error.detail
        raise Refused(400, f"The form in the request body cannot be parsed: {reason}", code="invalid_form") from None


def _media_type(scope: Scope) -> bytes:
    return header(scope, b"content-type").split(b";")[0].strip().lower()


def _number(value: object) -> float:
    return math.inf if isinstance(value, str) and len(value) > LONGEST_NUMBER else integer(value)


def _in_pieces(body: bytes) -> Receive:
    start = 0

    async def receive() -> Message:
        nonlocal start
        await asyncio.sleep(0)
        piece = body[start : start + PIECE]
        start += PIECE
        return {"type": "http.request", "body": piece, "more_body": start < len(body)}

    return receive
