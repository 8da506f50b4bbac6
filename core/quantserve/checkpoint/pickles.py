"""Names, dtypes and shapes out of a torch file (``.bin``, ``.pt``), without torch and without running what is in it."""

from __future__ import annotations

import io
import zipfile
from typing import Any, BinaryIO, Final

from quantserve.checkpoint.data import DTYPE_BITS, Tensor
from quantserve.checkpoint.pickle_machine import Array, BadPickle, Machine
from quantserve.checkpoint.text import counted, shown, some
from quantserve.errors import CheckpointError
from quantserve.finding import Finding

MAX_PICKLE: Final = 64 * 2**20
"""Bytes of data.pkl; a 70B checkpoint has well under one."""

MAX_READ: Final = 32 * 2**20
"""Bytes zipfile may read at once: bounds the directory of the archive."""


def read_pickle(file: BinaryIO, name: str) -> tuple[dict[str, Tensor], dict[str, object], list[Finding]]:
    """Tensors, other entries and findings of one ``.bin`` or ``.pt`` file. OSError is left to the caller."""
    label = shown(name)
    try:
        top, sizes = _load(file)
    except BadPickle as error:
        names = some(error.names or [name])
        return {}, {}, [Finding.error(error.code, f"{label}: {error}", names, error.fix)]
    tensors, other = _entries(top, name)
    findings = _missing_data(top, sizes, label)
    if not tensors:
        fix = "save the state dict itself, not an object around it"
        findings.append(Finding.error("pickle-invalid", f"{label}: no tensors at its top level", (label,), fix))
    return tensors, other, findings


def _load(file: BinaryIO) -> tuple[dict[Any, object], dict[str, int]]:
    """The state dict, and the bytes of each storage in the archive by key. Raises BadPickle."""
    start = file.read(16)
    file.seek(0)
    if start.startswith(b"version "):
        raise BadPickle("a Git LFS pointer, not the weights", "lfs-pointer", "fetch the real file with `git lfs pull`")
    if not start.startswith(b"PK"):
        what = "a torch file of the format before version 1.6" if start.startswith(b"\x80") else "no torch file"
        raise BadPickle(f"{what} (not a zip archive)", "pickle-legacy")
    raw, sizes = _open_archive(file)
    machine = Machine()
    top = machine.run(raw)
    if machine.unsafe:
        raise BadPickle(
            f"it wants to call {', '.join(some(machine.unsafe))}, which no state dict needs; nothing was run",
            "pickle-unsafe",
            "do not load it; take the weights from a source you trust, as safetensors",
            machine.unsafe,
        )
    if not isinstance(top, dict):
        raise BadPickle("it does not hold a state dict")
    return top, sizes


class _Bounded(io.RawIOBase):
    """Passes reads through, refusing one of absurd size before memory is taken for it."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1, /) -> bytes:
        if size > MAX_READ:
            raise BadPickle(f"its directory takes {size:,} bytes, the limit is {MAX_READ:,}")
        data = self._file.read(MAX_READ + 1 if size < 0 else size)
        if len(data) > MAX_READ:
            raise BadPickle(f"its directory takes more than the limit of {MAX_READ:,} bytes")
        return data


def _open_archive(file: BinaryIO) -> tuple[bytes, dict[str, int]]:
    """The program and the sizes of the storages by key."""
    try:
        with zipfile.ZipFile(_Bounded(file)) as archive:
            members = {info.filename: info for info in archive.infolist()}
            programs = [member for member in members if member.rpartition("/")[2] == "data.pkl"]
            if len(programs) != 1:
                raise BadPickle(f"the archive has {counted(len(programs), 'data.pkl')} instead of one")
            info = members[programs[0]]
            if info.file_size > MAX_PICKLE:
                raise BadPickle(f"data.pkl has {info.file_size:,} bytes, the limit is {MAX_PICKLE:,}")
            with archive.open(info) as program:
                raw = program.read(MAX_PICKLE + 1)
    except (BadPickle, CheckpointError, OSError):
        raise
    except Exception as error:  # zipfile lets struct.error, ValueError, zlib.error and others through
        raise BadPickle(f"the archive is damaged ({error}); it may be cut off") from None
    if len(raw) > MAX_PICKLE:
        raise BadPickle(f"data.pkl unpacks to more than {MAX_PICKLE:,} bytes")
    prefix = programs[0].removesuffix("data.pkl") + "data/"
    return raw, {key.removeprefix(prefix): i.file_size for key, i in members.items() if key.startswith(prefix)}


def _entries(top: dict[Any, object], file: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    tensors: dict[str, Tensor] = {}
    other: dict[str, object] = {}
    for key, value in top.items():
        name = key if isinstance(key, str) else shown(repr(key))
        if isinstance(value, Array):
            tensors[name] = Tensor(name, value.dtype, value.shape, file)
        elif value is None or isinstance(value, bool | int | float):
            other[name] = value
        elif isinstance(value, str):
            other[name] = shown(value)
        elif isinstance(value, dict | list | tuple):
            other[name] = f"{type(value).__name__} of {counted(len(value), 'entry').replace('entrys', 'entries')}"
        else:
            other[name] = "object"
    return tensors, other


def _missing_data(top: dict[Any, object], sizes: dict[str, int], label: str) -> list[Finding]:
    """Tensors whose storage is absent from the archive or shorter than they need."""
    short = [
        f"{shown(str(key))}: {value.dtype} {list(value.shape)} needs storage {shown(value.storage.key)}, "
        f"which has {sizes.get(value.storage.key, 0):,} bytes"
        for key, value in top.items()
        if isinstance(value, Array)
        and sizes.get(value.storage.key, -1) < value.storage.count * DTYPE_BITS[value.storage.dtype] // 8
    ]
    if not short:
        return []
    what = f"{counted(len(short), 'tensor')} of {label} without their data: {short[0]}"
    return [Finding.error("file-truncated", what, some(short), "download the file again")]
