"""Text from files, plugins and clients, made harmless: the one place that decides what a terminal or a log may get.

A tensor name, a plugin's message or a request path may hold escape sequences that clear the screen or set its title,
characters that turn the direction of reading, that are not visible, that fake a new line, or that UTF-8 cannot hold.
"""

from __future__ import annotations

import json
import logging
import re
from types import TracebackType
from typing import Any, Final

LONGEST: Final = 2_000
"""Characters of a message."""

LONGEST_ERROR: Final = 100_000
"""Characters of the text of an exception, which may list the findings of many models."""

_BLANK: Final = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""Characters that Unicode counts as printable and no font draws."""

_NOT_ASCII: Final = re.compile(r"[^\n -~]")

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def escaped(text: str, keep: str = "") -> str:
    r"""`text` with what cannot be read written as ``\x1b``, ``\u202e``, ``\ud800``: control and format characters,
    line and paragraph separators, surrogates, unassigned and private characters; those of `keep` stay.
    """
    if text.isascii():
        if text.isprintable():
            return text
    elif text.isprintable() and not _BLANK.search(text):
        return text
    return "".join(c if c in keep or (c.isprintable() and not _BLANK.match(c)) else ascii(c)[1:-1] for c in text)


def harmless(text: str, longest: int = LONGEST, *, keep: str = "") -> str:
    """`escaped` text of at most `longest` characters; where it was longer, its end says how long."""
    made = escaped(text[:longest], keep)
    if len(text) <= longest and len(made) <= longest:
        return made
    end = f"... ({len(text):,} characters)"
    return made[: max(0, longest - len(end))] + end


def to_json(value: object, **options: Any) -> str:
    """JSON in ASCII, which every locale can print and no terminal obeys.

    Half of a surrogate pair, which JSON readers refuse, becomes text (``\\ud800``). `options` go to `json.dumps`.
    """
    return _NOT_ASCII.sub(_escape, json.dumps(value, ensure_ascii=False, **options))


class LogFormatter(logging.Formatter):
    """A formatter whose records are one line each, tracebacks apart, whatever a client's request holds."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        record.message = escaped(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: ExcInfo) -> str:
        """The traceback of a record."""
        return escaped(super().formatException(ei), "\n")


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xD800 <= code < 0xE000:
        return f"\\\\u{code:04x}"
    return "".join(f"\\u{unit:04x}" for unit in ([code] if code < 0x10000 else _pair(code)))


def _pair(code: int) -> tuple[int, int]:
    return 0xD800 + (code - 0x10000 >> 10), 0xDC00 + (code & 0x3FF)
