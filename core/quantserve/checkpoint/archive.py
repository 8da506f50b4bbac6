"""The zip archive of a torch file, read so that its members are those torch reads.

Readers of zip archives disagree about files that are not well-formed: where the directory begins, which of two members
of one name counts, whether case matters (torch's reader ignores it). A file may show harmless members to one and others
to the next, so one that leaves room for that is refused. Sizes are bounded before memory is taken.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, Final

MAX_DIRECTORY: Final = 32 * 2**20
"""Bytes of the directory; a member takes about 80."""

_LOCAL: Final = struct.Struct("<4s5H3L2H")
_ENTRY: Final = struct.Struct("<4s6H3L5H2L")
_END: Final = struct.Struct("<4s4H2LH")
_LOCATOR: Final = struct.Struct("<4sLQL")
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_TAIL: Final = _END.size + 2**16 - 1
"""Bytes at the end of a file in which the end record is: a comment may follow it."""

_UNKNOWN: Final = 2**32 - 1
"""A size or offset that is in the zip64 field of an entry instead."""

_STORED: Final = 0
_DEFLATED: Final = 8
_NOT_PLAIN: Final = 1 | 1 << 5 | 1 << 6 | 1 << 13
"""Flags of an encrypted or patched member."""


class BadArchive(ValueError):
    """An archive that is damaged, or that readers read differently; the message says how."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive.

    Attributes:
        name: as torch compares it: in lower case, without the folder that all members of a torch file are in.
        size: bytes when unpacked.
    """

    name: str
    size: int
    stored: int
    method: int
    offset: int
    raw_name: bytes


class Archive:
    """The members of a torch file by `Member.name`. Raises BadArchive; OSError is left to the caller.

    Args:
        file: opened for reading and seeking.
        charge: called with the most entries the directory can have, before they are read.
    """

    def __init__(self, file: BinaryIO, charge: Callable[[int], None] = lambda steps: None) -> None:
        self._file = file
        size = file.seek(0, io.SEEK_END)
        self._tail_at = max(0, size - _TAIL)
        self._tail = b""
        self._tail = self._at(self._tail_at, size - self._tail_at)
        start, length, count = self._directory()
        charge(length // _ENTRY.size)
        self.members = _members(self._at(start, length), count, start)

    def read(self, name: str, longest: int) -> bytes:
        """The bytes of a member. Raises BadArchive when it is absent, damaged, or longer than `longest`."""
        member = self.members.get(name)
        if member is None:
            raise BadArchive(f"the archive has no {name}")
        if member.size > longest or member.stored > longest:
            raise BadArchive(f"{name} has {max(member.size, member.stored):,} bytes, the limit is {longest:,}")
        magic, *_, name_length, extra_length = _LOCAL.unpack(self._at(member.offset, _LOCAL.size))
        if magic != b"PK\x03\x04" or self._at(member.offset + _LOCAL.size, name_length) != member.raw_name:
            raise BadArchive(f"another file than {name} is where the directory says")
        raw = self._at(member.offset + _LOCAL.size + name_length + extra_length, member.stored)
        if member.method == _STORED:
            return raw
        packed = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            made = packed.decompress(raw, member.size + 1)
        except zlib.error as error:
            raise BadArchive(f"{name} cannot be unpacked ({error})") from None
        if len(made) != member.size:
            raise BadArchive(f"{name} unpacks to another size than the {member.size:,} bytes its directory says")
        return made

    def _at(self, offset: int, length: int) -> bytes:
        inside = offset - self._tail_at
        if inside >= 0 and inside + length <= len(self._tail):  # most directories: a remote file takes one request
            return self._tail[inside : inside + length]
        self._file.seek(offset)
        data = self._file.read(length)
        if len(data) < length:
            raise BadArchive("the archive is cut off")
        return data

    def _directory(self) -> tuple[int, int, int]:
        """Offset and bytes of the directory, and its number of entries; it lies right before its end record."""
        at = self._tail.rfind(b"PK\x05\x06", 0, max(0, len(self._tail) - _END.size + 4))
        if at < 0:
            raise BadArchive("the archive has no directory; it may be cut off")
        end = self._tail_at + at
        _, disk, start_disk, here, count, length, start, _ = _END.unpack_from(self._tail, at)
        if end >= _LOCATOR.size:
            magic, end64_disk, end64, disks = _LOCATOR.unpack(self._at(end - _LOCATOR.size, _LOCATOR.size))
            if magic == b"PK\x06\x07":
                if end64 != end - _LOCATOR.size - _END64.size or end64_disk or disks > 1:
                    raise BadArchive("its zip64 records are not where they belong")
                end = end64
                magic, *_, disk, start_disk, here, count, length, start = _END64.unpack(self._at(end, _END64.size))
                if magic != b"PK\x06\x06":
                    raise BadArchive("its zip64 records are damaged")
        if disk or start_disk or here != count:
            raise BadArchive("it is one of several parts")
        if length > MAX_DIRECTORY:
            raise BadArchive(f"its directory takes {length:,} bytes, the limit is {MAX_DIRECTORY:,}")
        if start + length != end:
            raise BadArchive("its directory is not right before its end, so that readers look for it in two places")
        return start, length, count


def _members(directory: bytes, count: int, end: int) -> dict[str, Member]:
    """The members by name; `end` is where the last must have ended."""
    at, folder = 0, ""
    members: dict[str, Member] = {}
    for _ in range(count):
        if len(directory) - at < _ENTRY.size:
            raise BadArchive("its directory is cut off")
        entry = _ENTRY.unpack_from(directory, at)
        magic, _, _, flags, method, _, _, _, stored, size, name_length, extra_length, comment_length, *_, offset = entry
        at += _ENTRY.size
        raw_name, extra = (
            directory[at : at + name_length],
            directory[at + name_length : at + name_length + extra_length],
        )
        at += name_length + extra_length + comment_length
        if magic != b"PK\x01\x02" or at > len(directory):
            raise BadArchive("its directory is damaged")
        size, stored, offset = _zip64(extra, size, stored, offset)
        if b"\0" in raw_name:
            raise BadArchive("a name in it holds a null byte")
        name = raw_name.decode(errors="surrogateescape")
        if flags & _NOT_PLAIN or method not in (_STORED, _DEFLATED) or (method == _STORED and stored != size):
            raise BadArchive(f"{name[:100]!r} is encrypted or packed in a way that torch does not read")
        if offset + _LOCAL.size + name_length + stored > end:
            raise BadArchive(f"{name[:100]!r} lies outside the file")
        if not folder:
            folder, found, _ = name.partition("/")
            if not found or not folder:
                raise BadArchive("its members are in no folder")
        if not name.startswith(folder + "/"):
            raise BadArchive(
                f"{name[:100]!r} is not in the folder {folder[:100]!r} of the others, where torch wants it"
            )
        short = name.removeprefix(folder + "/").casefold()
        if short in members:
            raise BadArchive(f"it has two members called {name[:100]!r}, upper and lower case being the same to torch")
        members[short] = Member(short, size, stored, method, offset, raw_name)
    if at != len(directory):
        raise BadArchive("its directory has more entries than it says")
    return members


def _zip64(extra: bytes, size: int, stored: int, offset: int) -> tuple[int, int, int]:
    """The three numbers, those that do not fit into 32 bits taken from the zip64 field."""
    if _UNKNOWN not in (size, stored, offset):
        return size, stored, offset
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wanted = [size, stored, offset].count(_UNKNOWN)
            if length < 8 * wanted or len(extra) < 4 + length:
                break
            large = iter(struct.unpack_from(f"<{wanted}Q", extra, 4))
            return tuple(next(large) if value == _UNKNOWN else value for value in (size, stored, offset))  # type: ignore[return-value]
        extra = extra[4 + length :]
    raise BadArchive("its zip64 records are damaged")
