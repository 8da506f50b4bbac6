"""The error event that ends a broken stream, in the form of each API."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

_SEQUENCE: Final = re.compile(rb'"sequence_number": ?(\d+)')
_ANTHROPIC_TYPES: Final = {
    "service_unavailable_error": "overloaded_error",
    "timeout_error": "timeout_error",
    "rate_limit_error": "rate_limit_error",
    "invalid_request_error": "invalid_request_error",
}
"""Anthropic's error types by OpenAI's; others are ``api_error``."""


def error_event(path: str, error: Mapping[str, Any], last: bytes = b"") -> bytes:
    """The bytes that end a stream of server-sent events with an error.

    Args:
        path: the request's path, which says which API it is.
        error: OpenAI's error object.
        last: the bytes sent last; they may end in the middle of an event.
    """
    event: dict[str, Any]
    separator = b"" if not last or last.endswith((b"\n\n", b"\r\n\r\n")) else b"\n\n"
    if path.endswith("/v1/messages"):
        kind = _ANTHROPIC_TYPES.get(error["type"], "api_error")
        event = {"type": "error", "error": {"type": kind, "message": error["message"]}}
    elif path.endswith("/v1/responses"):
        numbers = _SEQUENCE.findall(last)
        number = int(numbers[-1]) + 1 if numbers else 0
        code = error["code"] or error["type"]
        event = {"type": "error", "code": code, "message": error["message"], "param": None, "sequence_number": number}
    else:
        return separator + b"data: " + json.dumps({"error": error}).encode() + b"\n\n"
    return separator + b"event: error\ndata: " + json.dumps(event).encode() + b"\n\n"
