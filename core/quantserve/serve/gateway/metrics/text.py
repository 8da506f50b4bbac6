"""Prometheus' text format: merges the metrics of several processes, and reads totals out of a text.

A replica's text has about 1000 lines and is merged at every scrape, so most lines are only cut with `find`; lines with
a clashing label or an exemplar, which are rare, are parsed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_SUFFIXES: Final[Mapping[bytes, tuple[bytes, ...]]] = {
    b"histogram": (b"_bucket", b"_sum", b"_count"),
    b"summary": (b"_sum", b"_count"),
}
_TYPES: Final = (b"counter", b"gauge", b"histogram", b"summary", b"untyped")


@dataclass(slots=True)
class _Family:
    name: bytes
    help: bytes = b""
    type: bytes = b""
    samples: list[bytes] = field(default_factory=list)

    def owns(self, name: bytes) -> bool:
        """Whether a sample of that name is one of this family's."""
        if not name.startswith(self.name):
            return False
        return name == self.name or name[len(self.name) :] in _SUFFIXES.get(self.type, ())


class Merger:
    """Merges texts family by family; invalid lines are dropped, because one would invalidate the whole scrape."""

    def __init__(self) -> None:
        self._families: dict[bytes, _Family] = {}

    def add(self, text: bytes, labels: Mapping[str, str] | None = None) -> None:
        """Add one process's text, with labels for each of its samples.

        A label that a sample already has is kept as ``exported_NAME``, like in Prometheus. Dropped are exemplars, which
        this format does not have, an incomplete last line, and a family whose type differs in an earlier text.
        """
        extra = b",".join(
            key.encode() + b'="' + escaped(value).encode() + b'"' for key, value in (labels or {}).items()
        )
        keys = [key.encode() for key in labels or {}]
        marks = [key + b'="' for key in keys]
        lines = text.split(b"\n")
        lines.pop()
        family: _Family | None = None
        for line in lines:
            if line.startswith(b"#"):
                family = self._declare(line, family)
                continue
            name, labelled = _name(line)
            if family is None or not family.owns(name):
                family = self._family_of(name)
                if family is None:
                    continue
            if not _plain(line, labelled) or any(mark in line for mark in marks):
                line = _taken_apart(line, name, keys, extra)
            elif labelled and extra:
                start = line.index(b"{") + 1
                rest = line[start:]
                comma = b"" if rest.lstrip().startswith((b"}", b",")) else b","
                line = line[:start] + extra + comma + rest
            elif extra:
                line = name + b"{" + extra + b"}" + line[len(name) :]
            if line:
                family.samples.append(line)

    def render(self) -> bytes:
        """The text: each family once, with its samples after its HELP and TYPE lines."""
        parts: list[bytes] = []
        for family in self._families.values():
            if family.samples:
                if family.help:
                    parts.append(family.help)
                if family.type:
                    parts.append(b"# TYPE " + family.name + b" " + family.type)
                parts += family.samples
        return b"\n".join([*parts, b""])

    def _declare(self, line: bytes, family: _Family | None) -> _Family | None:
        """The family that a HELP or TYPE line declares; the current one for any other comment.

        A family whose type differs from an earlier text's gets a new object, which is dropped with its samples.
        """
        words = line.split(None, 3)
        if len(words) < 3 or words[0] != b"#" or words[1] not in (b"HELP", b"TYPE") or not _is_name(words[2]):
            return family
        found = self._families.setdefault(words[2], _Family(words[2]))
        if words[1] == b"HELP":
            found.help = found.help or line
        elif len(words) == 4:
            kind = words[3].strip()
            kind = kind if kind in _TYPES else b"untyped"
            if not found.type and not found.samples:
                found.type = kind
            elif found.type != kind:
                return _Family(found.name, type=kind)
        return found

    def _family_of(self, name: bytes) -> _Family | None:
        """The family of a sample without a declaration directly before it."""
        stem = name.rpartition(b"_")[0]
        for candidate in (self._families.get(name), self._families.get(stem)):
            if candidate is not None and candidate.owns(name):
                return candidate
        return self._families.setdefault(name, _Family(name)) if _is_name(name) else None


def merge(own: bytes, replicas: Sequence[tuple[Mapping[str, str], bytes]]) -> bytes:
    """One text of a process's own metrics and its replicas', whose samples get labels; see `Merger.add`."""
    merger = Merger()
    merger.add(own)
    for labels, text in replicas:
        merger.add(text, labels)
    return merger.render()


def escaped(value: str) -> str:
    """A label value, escaped for use between quotes."""
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def totals(text: bytes, names: Iterable[str]) -> dict[str, float]:
    """Sum over all label sets of each of some sample names; a name that is not there is left out."""
    text = b"\n" + text
    found: dict[str, float] = {}
    for name in names:
        start = text.find(b"\n" + name.encode())
        while start >= 0:
            end = text.find(b"\n", start + 1)
            line = text[start + 1 : end if end >= 0 else len(text)]
            if _name(line)[0] == name.encode() and (value := _number(line[_end_of_labels(line) :])) is not None:
                found[name] = found.get(name, 0.0) + value
            start = text.find(b"\n" + name.encode(), start + 1)
    return found


def _name(line: bytes) -> tuple[bytes, bool]:
    """The sample name a line begins with, and whether labels follow."""
    brace = line.find(b"{")
    head = line if brace < 0 else line[:brace]
    words = head.split(None, 1)
    if not words or line[0] in b" \t{":
        return b"", False
    return words[0], brace >= 0 and len(words) == 1


def _plain(line: bytes, labelled: bool) -> bool:
    """Whether a sample is complete and has no exemplar, by checks that need no parsing."""
    space = line.rfind(b" ")
    if b"#" in line or space < 0 or (labelled and not 0 < line.rfind(b"}") < space):
        return False
    try:
        float(line[space:])
    except ValueError:
        return False
    return True


def _is_name(name: bytes) -> bool:
    text = name.replace(b":", b"_")
    return text.isascii() and text.decode("ascii").isidentifier()


def _number(text: bytes) -> float | None:
    """The value in what follows a sample's labels."""
    try:
        return float(text.split(None, 1)[0])
    except (ValueError, IndexError):
        return None


def _labels(line: bytes, start: int) -> tuple[list[tuple[bytes, bytes]], int]:
    """Names and raw values (still escaped) of the labels from `start`, and where the closing brace ends.

    Raises:
        ValueError: they have no end.
    """
    pairs: list[tuple[bytes, bytes]] = []
    while True:
        while line[start : start + 1] in (b" ", b"\t", b","):
            start += 1
        if line[start : start + 1] == b"}":
            return pairs, start + 1
        equals = line.index(b"=", start)
        opening = line.index(b'"', equals) + 1
        closing = line.index(b'"', opening)
        while _backslashes(line[opening:closing]) % 2:
            closing = line.index(b'"', closing + 1)
        pairs.append((line[start:equals].strip(), line[opening:closing]))
        start = closing + 1


def _backslashes(value: bytes) -> int:
    """How many backslashes a value ends with; an odd number escapes the quote behind it."""
    return len(value) - len(value.rstrip(b"\\"))


def _end_of_labels(line: bytes) -> int:
    name, labelled = _name(line)
    try:
        return _labels(line, line.index(b"{") + 1)[1] if labelled else len(name)
    except ValueError:
        return len(line)


def _taken_apart(line: bytes, name: bytes, keys: Sequence[bytes], extra: bytes) -> bytes:
    """A parsed sample with further labels, clashing ones renamed and its exemplar removed; empty if it is invalid."""
    try:
        pairs, end = _labels(line, line.index(b"{") + 1) if _name(line)[1] else ([], len(name))
    except ValueError:
        return b""
    taken = {*keys, *(key for key, _ in pairs)}
    shown = [extra] if extra else []
    for key, value in pairs:
        new = key
        if key in keys:
            while new in taken:
                new = b"exported_" + new
            taken.add(new)
        shown.append(new + b'="' + value + b'"')
    braces = b"{" + b",".join(shown) + b"}" if shown else b""
    rest = line[end:].partition(b"#")[0].rstrip()
    return b"" if _number(rest) is None else name + braces + rest
