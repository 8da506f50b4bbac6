"""The header of a GGUF file: metadata and the list of tensors. Standard library only.

Layout, little-endian: ``GGUF``, version u32 (2 or 3), tensors u64, metadata u64; then for each metadatum a key, a type
u32 and a value; then for each tensor a name, dimensions u32, their lengths u64 (the fastest first), a type u32 and an
offset u64 from the start of the data, which is aligned. A string is a length u64 and UTF-8. Source: docs/gguf.md of
https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import BinaryIO, Final

from quantserve.api import BadContainer
from quantserve_gguf.blocks import TYPES, Blocks

MAX_TENSORS: Final = 500_000
MAX_KEYS: Final = 100_000
LONGEST_TEXT: Final = 1 << 24
LONGEST_NAME: Final = 500
MAX_ELEMENTS: Final = 1 << 26
KEPT: Final = 1024
"""Numbers of an array that are kept; longer arrays and arrays of texts are counted only."""

_NUMBERS: Final = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_TEXT, _ARRAY = 8, 9
_CHUNK: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Counted:
    """An array whose elements were not kept; `length` is their number."""

    length: int


Value = int | float | bool | str | tuple[int | float | bool, ...] | Counted


@dataclass(frozen=True, slots=True)
class Info:
    """One tensor: its name in the file, shape in the order of torch ([n, k]), type, and position in bytes."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int

    @property
    def blocks(self) -> Blocks | None:
        """Its type; None where it is not known."""
        return TYPES.get(self.type)

    @property
    def nbytes(self) -> int | None:
        """Bytes of its data; None where the type is not known or a row is no whole number of blocks."""
        blocks = self.blocks
        if blocks is None or (self.shape[-1] if self.shape else 1) % blocks.elements:
            return None
        return prod(self.shape) // blocks.elements * blocks.nbytes


@dataclass(frozen=True)
class Header:
    """What a file says before its data."""

    metadata: Mapping[str, Value]
    tensors: tuple[Info, ...]


def read_header(file: BinaryIO) -> Header:
    """Read the header of an open file.

    Raises:
        BadContainer: it is no GGUF file of version 2 or 3, is cut off in its header, or has sizes beyond every model.
    """
    stream = _Stream(file)
    magic = bytes(stream.take(4))
    if magic != b"GGUF":
        raise BadContainer(f"it begins with {magic!r}, not with GGUF")
    (version,) = stream.unpack("I")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        why = "is big-endian" if swapped in (2, 3) else f"is GGUF version {version}; versions 2 and 3 are read"
        raise BadContainer(f"it {why}")
    tensors, keys = stream.unpack("QQ")
    if tensors > MAX_TENSORS or keys > MAX_KEYS:
        raise BadContainer(
            f"it claims {tensors:,} tensors and {keys:,} metadata; the limits are {MAX_TENSORS:,} and {MAX_KEYS:,}"
        )
    metadata: dict[str, Value] = {}
    for _ in range(keys):
        key = stream.text(LONGEST_NAME)
        metadata[key] = stream.value(*stream.unpack("I"))
    infos = [_info(stream) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
        raise BadContainer(f"general.alignment is {str(alignment)[:80]}")
    data = -(-stream.position // alignment) * alignment
    for name, _, _, offset in infos:
        if offset % alignment:
            raise BadContainer(f"tensor {name} begins at {offset}, which is not a multiple of {alignment}")
    return Header(metadata, tuple(Info(name, shape, kind, data + offset) for name, shape, kind, offset in infos))


def texts_of(file: BinaryIO, wanted: str) -> Iterator[str]:
    """The elements of an array of texts, which `read_header` only counts; none where the file has no such key."""
    stream = _Stream(file)
    stream.take(8)
    _, keys = stream.unpack("QQ")
    for _ in range(keys):
        key, (kind,) = stream.text(LONGEST_NAME), stream.unpack("I")
        if key != wanted:
            stream.value(kind)
            continue
        _, count = stream.unpack("IQ")
        for _ in range(count):
            yield stream.text(LONGEST_TEXT)
        return


def _info(stream: _Stream) -> tuple[str, tuple[int, ...], int, int]:
    name = stream.text(LONGEST_NAME)
    (count,) = stream.unpack("I")
    if count > 8:
        raise BadContainer(f"tensor {name} has {count:,} dimensions")
    shape = stream.unpack("Q" * count)[::-1]
    if prod(max(size, 1) for size in shape) >= 1 << 56:
        raise BadContainer(f"tensor {name} has the shape {list(shape)}")
    kind, offset = stream.unpack("IQ")
    if offset >= 1 << 62:
        raise BadContainer(f"tensor {name} begins at {offset:,}")
    return name, shape, kind, offset


class _Stream:
    """A file read forward in pieces; what was passed is forgotten."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._buffer, self._at, self.position = file, b"", 0, 0

    def take(self, count: int) -> memoryview:
        """The next bytes."""
        if self._at + count > len(self._buffer):
            rest = self._buffer[self._at :]
            more = self._file.read(max(_CHUNK, count - len(rest)))
            while more and len(rest) + len(more) < count:
                piece = self._file.read(count - len(rest) - len(more))
                if not piece:
                    break
                more += piece
            self._buffer, self._at = rest + more, 0
            if len(self._buffer) < count:
                raise BadContainer(f"its header is cut off at byte {self.position + len(self._buffer):,}")
        view = memoryview(self._buffer)[self._at : self._at + count]
        self._at += count
        self.position += count
        return view

    def unpack(self, letters: str) -> tuple[int, ...]:
        """The next numbers."""
        form = "<" + letters
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def text(self, longest: int) -> str:
        """The next text; bytes that are not UTF-8 become U+FFFD."""
        (length,) = self.unpack("Q")
        if length > longest:
            raise BadContainer(f"a text at byte {self.position:,} has {length:,} bytes; the limit is {longest:,}")
        return str(self.take(length), "utf-8", "replace")

    def value(self, kind: int) -> Value:
        """The next value of a type."""
        if kind == _TEXT:
            return self.text(LONGEST_TEXT)
        if kind == _ARRAY:
            return self._array()
        if kind not in _NUMBERS:
            raise BadContainer(f"a metadatum at byte {self.position:,} has the unknown type {kind}")
        return self.unpack(_NUMBERS[kind])[0]

    def _array(self) -> Value:
        kind, count = self.unpack("IQ")
        if count > MAX_ELEMENTS:
            raise BadContainer(f"an array at byte {self.position:,} has {count:,} elements")
        if kind == _TEXT:
            self._skip_texts(count)
            return Counted(count)
        if kind not in _NUMBERS:
            raise BadContainer(f"an array at byte {self.position:,} has elements of type {kind}")
        letter = _NUMBERS[kind]
        if count <= KEPT:
            return self.unpack(letter * count)
        left = count * struct.calcsize("<" + letter)
        while left:
            left -= len(self.take(min(left, _CHUNK)))
        return Counted(count)

    def _skip_texts(self, left: int) -> None:
        """Pass texts, hundreds of thousands in a tokenizer: those that the buffer holds whole without a call each."""
        length_at = struct.Struct("<Q").unpack_from
        while left:
            buffer, at, size = self._buffer, self._at, len(self._buffer)
            while left and at + 8 <= size:
                following = at + 8 + length_at(buffer, at)[0]
                if following > size:
                    break
                at, left = following, left - 1
            self.position += at - self._at
            self._at = at
            if left:
                self.text(LONGEST_TEXT)
                left -= 1
