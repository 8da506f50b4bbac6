"""Reads some fields of a JSON object without building the others, and checks its text.

The text is checked and skipped in steps of a few milliseconds, so that a large body parsed in a thread does not hold
the interpreter for long. What passes is read by vLLM's parser exactly as here.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw, UnsetType
from pydantic import TypeAdapter, ValidationError

from quantserve.serve.asgi import Refused

STEP: Final = 64 << 10
"""Bytes checked at once."""
INLINE: Final = 64 << 10
"""Longest text, in bytes, that is read within a millisecond or two. Of a longer body, the field with an unusable value
is not named, and long lists are not counted to their end.
"""
IDS_PER_VALUE: Final = 10
"""Number of token ids that count as one value: vLLM reads them fast, and a long prompt has many."""
MOST_FIELDS: Final = 4096
"""Most items of a long list that are read without building the others: a type with a field for each takes 15 ms."""
LONGEST_NUMBER: Final = 100
"""Longest number, in characters, that is read; longer ones count as infinite."""
_UNFINISHED: Final = re.compile(rb"(?:\\u[dD][89abAB]..)?(?:\\(?:u.{0,4}|.?))?[-+.\deE]{0,400}\Z", re.DOTALL)
"""What must not be cut in two: an escape sequence, a pair of surrogates, a number."""
_LONE: Final = re.compile(rb"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]", re.DOTALL)
_LONG: Final = re.compile(rb"[-+.\deE]{19,}")
_INTEGER: Final = re.compile(rb"-?\d+")
_LIST: Final = re.compile(rb"\[")
_INT: Final = TypeAdapter(int)


class _First(msgspec.Struct, array_like=True):
    item: Raw | UnsetType = UNSET


_list = msgspec.json.Decoder(list[Raw])
_first = msgspec.json.Decoder(_First)


class FieldReader:
    """Reads the given top-level fields of a JSON object.

    Args:
        names: of the fields.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {f"f{index}": name for index, name in enumerate(sorted(set(names)))}
        fields = [(field, Raw | UnsetType, UNSET) for field in self._names]
        self._decoder = msgspec.json.Decoder(msgspec.defstruct("Fields", fields, rename=self._names))

    def read(self, body: bytes) -> dict[str, Raw]:
        """The fields that are present, as JSON. Of a field given twice the last one counts, as for vLLM.

        Raises:
            Refused: 400, the body is not a JSON object.
        """
        found = _decode(self._decoder, body)
        return {name: raw for field, name in self._names.items() if (raw := getattr(found, field)) is not UNSET}


def check_text(body: bytes, max_values: int) -> int:
    """Check what vLLM reads otherwise than JSON's grammar has it, or cannot send to its engine.

    Args:
        body: a JSON text.
        max_values: most texts, keys, lists and objects of one body, and a tenth of its numbers; about.

    Returns:
        the number of values in lists and objects, about.

    Raises:
        Refused: 400, the text is not UTF-8, has an unpaired surrogate or an integer beyond 64 bits, or too many values.
    """
    try:
        return _check(body, max_values)
    except Refused as refused:
        if refused.error["code"] == "too_many_values" or len(body) > INLINE:
            raise
        raise _named(body, refused) from None


def _check(body: bytes, max_values: int) -> int:
    decoder = codecs.getincrementaldecoder("utf-8")()
    quotes = commas = containers = 0
    try:
        for piece, outside in _pieces(body):
            decoder.decode(piece)
            if b"\\u" in piece and _LONE.search(piece):
                raise _unusable("text that is not valid Unicode (an unpaired surrogate)")
            quotes += piece.count(b'"')
            commas += outside.count(b",")
            containers += outside.count(b"[") + outside.count(b"{")
            if max(commas // IDS_PER_VALUE, containers + quotes // 2) > max_values:
                raise too_many_values(max_values)
            for number in _LONG.findall(outside):
                if _INTEGER.fullmatch(number) and (len(number) > 20 or not -(2**63) <= int(number) < 2**64):
                    raise _unusable(f"the number {number[:40].decode()}, which does not fit into 64 bits")
        decoder.decode(b"", final=True)
        return commas + 1
    except UnicodeDecodeError:
        raise Refused(400, f"The request body must be UTF-8{_encoding(body)}.", code="invalid_json") from None


def _pieces(text: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Cut a JSON text into pieces, with backslashes and quotes replaced that begin or end nothing; each piece also
    without the contents of its strings.
    """
    start = quotes = 0
    while start < len(text):
        piece = text[start : start + STEP].replace(b"\\\\", b"__").replace(b'\\"', b"__")  # of the same length
        start += len(piece)
        if start < len(text) and (unfinished := _UNFINISHED.search(piece, len(piece) - 512)):
            start -= len(piece) - unfinished.start()
            piece = piece[: unfinished.start()]
        parts = piece.split(b'"')
        yield piece, b"".join(parts[quotes & 1 :: 2])
        quotes += len(parts) - 1


def too_many_values(limit: int) -> Refused:
    """The refusal of a body with more values than `limit`."""
    message = (
        f"The request body has too many JSON values: the limit is {limit}; {IDS_PER_VALUE} token ids count as one."
    )
    return Refused(400, message, code="too_many_values")


def number(raw: Raw) -> float:
    """`integer` of a JSON value; infinity for values of more than `LONGEST_NUMBER` characters, which are not read."""
    return math.inf if len(memoryview(raw)) > LONGEST_NUMBER else integer(json.loads(bytes(raw)))


def integer(value: object) -> float:
    """The integer that vLLM's request classes (pydantic, lax) make of a value, also of texts and booleans;
    0 for values that they refuse.
    """
    if isinstance(value, float):
        return value  # also one that they refuse
    try:
        return _INT.validate_python(value)
    except ValidationError:
        return 0


def text(raw: Raw | None, longest: int = 1024) -> str | None:
    """A text of at most `longest` bytes of JSON; None for other values."""
    if raw is None or len(memoryview(raw)) > longest:
        return None
    value = json.loads(bytes(raw))
    return value if isinstance(value, str) else None


def shown(raw: Raw) -> str:
    """The beginning of a value, for a message."""
    return bytes(memoryview(raw)[:40]).decode(errors="replace")


def items(raw: Raw, most: int) -> list[Raw]:
    """The items of a list, of a long one often not more than ``most + 1``; none for other values."""
    if not _LIST.match(memoryview(raw)):
        return []
    if len(memoryview(raw)) <= INLINE or most > MOST_FIELDS:
        return list(_decode(_list, raw))
    return [item for item in msgspec.structs.astuple(_decode(_up_to(most + 1), raw)) if item is not UNSET]


@lru_cache(16)
def _up_to(most: int) -> msgspec.json.Decoder[Any]:
    """Reads the first items of a list and skips the others, of which there may be millions."""
    fields = [(f"f{index}", Raw | UnsetType, UNSET) for index in range(most)]
    return msgspec.json.Decoder(msgspec.defstruct("Items", fields, array_like=True))


def objects(raw: Raw) -> int:
    """Number of objects within an object."""
    return sum(outside.count(b"{") for _, outside in _pieces(bytes(raw))) - 1


def first(raw: Raw) -> Raw | None:
    """The first item of a list; None for other values."""
    item = _decode(_first, raw).item if _LIST.match(memoryview(raw)) else UNSET
    return None if item is UNSET else item


def is_token_ids(raw: Raw) -> bool:
    """Whether a value is a list of token ids."""
    return bool(found := _start_of_first(raw)) and found in b"-0123456789tf"


def token_ids(raw: Raw) -> int:
    """Number of token ids in a value, about: 0 if it has anything but integers and lists of them."""
    value = bytes(raw)
    return 0 if value.translate(None, b"[]-0123456789, \t\r\n") else value.count(b",") + 1


def is_list_of_lists(raw: Raw) -> bool:
    """Whether a value is a list that begins with a list."""
    return _start_of_first(raw) == b"["


def _start_of_first(raw: Raw) -> bytes:
    """The first byte of the first item of a list; empty for other values. There may be megabytes of space before it."""
    view = memoryview(raw)
    for start in range(1, len(view), STEP) if _LIST.match(view) else ():
        if found := bytes(view[start : start + STEP]).lstrip():
            return found[:1]
    return b""


def spliced(body: bytes, fields: Mapping[str, Any]) -> bytes:
    """A JSON object with further fields at its end, where they replace earlier ones of the same name."""
    if not fields:
        return body
    opening = body.rstrip()[:-1].rstrip()
    comma = b"" if opening.endswith(b"{") else b","
    return opening + comma + msgspec.json.encode(dict(fields))[1:]


def _decode(decoder: msgspec.json.Decoder[Any], text: bytes | Raw) -> Any:
    try:
        return decoder.decode(text)
    except msgspec.ValidationError:
        raise Refused(400, "The request body must be a JSON object.", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        reason = str(error).removeprefix("JSON is malformed: ")
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else reason
        raise Refused(400, f"The request body is not valid JSON: {reason}.", code="invalid_json") from None


def _named(body: bytes, refused: Refused) -> Refused:
    """The same refusal with the name of the first field that has an unusable value."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return refused
    for name, value in fields.items() if isinstance(fields, dict) else ():
        try:
            _check(json.dumps({name: value}).encode(), len(body))
        except Refused as cause:
            shown = name[:100].encode("ascii", "backslashreplace").decode()
            message = str(cause.error["message"]).replace("The request body", f"`{shown}`", 1)
            return Refused(400, message, param=shown, code="invalid_value")
    return refused


def _unusable(what: str) -> Refused:
    return Refused(400, f"The request body has {what}.", code="invalid_value")


def _encoding(body: bytes) -> str:
    found = json.detect_encoding(body[:4])
    return "" if found.startswith("utf-8") else f", not {found.upper()}"
