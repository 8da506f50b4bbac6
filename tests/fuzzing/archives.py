"""Zip archives: plain ones, and ones that use a freedom of the format or break a rule of it."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Sequence

LOCAL, ENTRY, END, END64, LOCATOR = "<4s2x2H8x2L2H", "<4s4x2H8x2L3H8xL", "<4sH2x2H2LH", "<4sQ12x4Q", "<4s4xQL"
LARGE = 2**32 - 1


def record(kind: str, signature: bytes, *values: int) -> bytes:
    """A record of an archive; numbers below 0 become 0."""
    return struct.pack(kind, signature, *(max(0, value) for value in values))


def archive(members: Sequence[tuple[bytes, bytes]], rule: str = "", by: int = 0) -> bytes:
    """An archive of names and data in which one rule is bent `by` a number; "" bends none."""

    def bent(value: int, name: str) -> int:
        return value + by if rule == name else value

    out, directory = bytearray(b"PK\3\4" * abs(by) if rule in ("prefix", "shifted") else b""), bytearray()
    shift = len(out) if rule == "shifted" else 0
    for name, data in members:
        packed = zlib.compress(data, wbits=-15) if rule == "deflated" else data
        method = bent(8 if rule == "deflated" else 0, "method")
        flags = 1 << abs(by) % 16 if rule == "flags" else 0
        sizes = len(packed), bent(len(data), "size")
        offset = bent(len(out) - shift, "offset")
        own_name = name.upper() if rule == "local name" else name
        padding = b"" if rule == "aligned" else b"FB\4\0ZZZZ"
        out += record(LOCAL, b"PK\3\4", flags, method, *sizes, len(own_name), len(padding))
        out += own_name + padding + packed
        zip64 = b""
        if rule.startswith("large"):
            zip64 = struct.pack("<2H3Q", 1, 24, max(0, sizes[1]), sizes[0], max(0, offset))
            zip64 = zip64[: abs(by)] if rule == "large, cut" else zip64
            sizes, offset = (LARGE, LARGE), LARGE
        comment = b"comment" if rule == "comments" else b""
        directory += record(ENTRY, b"PK\1\2", flags, method, *sizes, len(name), len(zip64), len(comment), offset)
        directory += name + zip64 + comment
    start = bent(len(out) - shift, "start")
    out += directory + bytes(abs(by) if rule in ("gap", "padded") else 0)
    length = bent(len(directory), "length") + (abs(by) if rule == "padded" else 0)
    count = bent(len(members), "count")
    if rule.startswith("zip64"):
        at = bent(len(out) - shift, "zip64 elsewhere")
        out += record(END64, b"PK\6\6", 44, count, count, length, bent(start, "zip64 start"))
        out += record(LOCATOR, b"PK\6\7", at, 1)
    comment = {"comment": b"comment", "end in the comment": b"PK\5\6" * 6}.get(rule, b"")
    return bytes(out) + record(END, b"PK\5\6", bent(0, "disk"), count, count, length, start, len(comment)) + comment


RULES = (
    "prefix", "shifted", "deflated", "method", "flags", "size", "offset", "local name", "aligned", "large",
    "large, cut", "comments", "start", "gap", "padded", "length", "count", "zip64", "zip64 elsewhere", "zip64 start",
    "comment", "end in the comment", "disk",
)  # fmt: skip


def odd_archive(chance: random.Random, members: Sequence[tuple[bytes, bytes]]) -> bytes:
    """An archive in which one rule is bent."""
    return archive(members, chance.choice(RULES), chance.choice([-46, -1, 1, 1, 2, 8, 12, 30, 46]))
