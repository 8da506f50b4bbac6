"""How names out of untrusted files are shortened for messages, and how JSON out of them is read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from typing import Final, NoReturn

from quantserve.text import harmless

SHOWN: Final = 20
"""Offenders listed per finding; the message gives the full count."""

LENGTH: Final = 200

MAX_TOKENS: Final = 8_000_000
"""Commas, colons and brackets of JSON: some seconds and 1 GB. The entry of a tensor in a header has 12."""


class BadJson(ValueError):
    """A file that is not JSON; the message says why and where."""


def shown(name: str) -> str:
    """`name`, short enough to stand in a message beside the numbers, and in one line."""
    return harmless(name, LENGTH)


def some(names: Iterable[str]) -> tuple[str, ...]:
    """The first names for `Finding.offenders`, each short enough to show."""
    return tuple(shown(name) for name in islice(names, SHOWN))


def counted(count: int, what: str) -> str:
    """`1 tensor`, `3 tensors`."""
    return f"{count} {what}" if count == 1 else f"{count:,} {what}s"


def parse_json(raw: bytes, *, strict: bool = False) -> object:
    """Parse JSON, or raise BadJson with the reason and, where known, line:column.

    `strict` refuses what a safetensors reader refuses: a key given twice, NaN and infinities, -0 (it is no integer),
    unpaired surrogates.
    """
    if len(raw) > MAX_TOKENS and sum(raw.count(token) for token in (b",", b":", b"[", b"{")) > MAX_TOKENS:
        raise BadJson(f"more than {MAX_TOKENS:,} values, names and brackets")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise BadJson(f"not UTF-8 at byte {error.start}") from None
    try:
        if not strict:
            return json.loads(text)
        integer = _no_minus_zero if "-0" in text else None
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=integer)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except BadJson:
        raise
    except json.JSONDecodeError as error:
        raise BadJson(f"{error.msg} at {error.lineno}:{error.colno}") from None
    except UnicodeEncodeError:
        raise BadJson("a string holds half of a surrogate pair") from None
    except RecursionError:
        raise BadJson("nested too deeply") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise BadJson("a number has too many digits") from None
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise BadJson(f"the key {shown(key)!r} is given twice")
            seen.add(key)
    return made


def _no_minus_zero(number: str) -> int:
    if number == "-0":
        raise BadJson("-0 is not an integer")
    return int(number)


def _no_constant(name: str) -> NoReturn:
    raise BadJson(f"{name} is not JSON")
