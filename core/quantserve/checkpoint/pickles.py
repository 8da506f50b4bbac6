"""Names, dtypes and shapes out of a torch file (``.bin``, ``.pt``), without torch and without running what is in it."""

from __future__ import annotations

import re
from typing import BinaryIO, Final

from quantserve.checkpoint.archive import Archive, BadArchive
from quantserve.checkpoint.data import Tensor
from quantserve.checkpoint.pickle_machine import SAVE_AGAIN, Array, BadPickle, Budget, Machine
from quantserve.checkpoint.text import SHOWN, counted, shown, some
from quantserve.finding import Finding

MAX_PICKLE: Final = 64 * 2**20
"""Bytes of data.pkl; a 70B checkpoint has well under one."""

_MAX_VERSION: Final = 64
"""Bytes of the member `version`, which has two."""

SAVE_STATE: Final = "save the state dict itself: torch.save(model.state_dict(), FILE)"


def read_pickle(
    file: BinaryIO, name: str, budget: Budget | None = None
) -> tuple[dict[str, Tensor], dict[str, object], list[Finding]]:
    """Tensors, other entries and findings of one ``.bin`` or ``.pt`` file. OSError is left to the caller.

    Args:
        file: opened for reading and seeking.
        name: shown in findings and stored in each `Tensor`.
        budget: what the interpreter may still do for all files of a checkpoint together.
    """
    label = shown(name)
    try:
        top, sizes = _load(file, budget or Budget())
    except BadPickle as error:
        names = some(error.names or [name])
        return {}, {}, [Finding.error(error.code, f"{label}: {error}", names, error.fix)]
    tensors, other = _entries(top, name)
    findings = _wrong_data(top, sizes, label)
    if not tensors:
        findings.append(Finding.error("pickle-invalid", f"{label}: no tensors at its top level", (label,), SAVE_STATE))
    return tensors, other, findings


def _load(file: BinaryIO, budget: Budget) -> tuple[dict[str, object], dict[str, int]]:
    """The state dict, and the bytes of each storage in the archive by key in lower case. Raises BadPickle."""
    start = file.read(16)
    if start.startswith(b"version "):
        raise BadPickle("a Git LFS pointer, not the weights", "lfs-pointer", "fetch the real file with `git lfs pull`")
    if not start.startswith(b"PK\x03\x04"):
        if start.startswith(b"\x80"):
            raise BadPickle("a torch file of the format before version 1.6 (not a zip archive)", "pickle-legacy")
        what = f"it begins with {shown(start.decode('latin-1'))!r}" if start else "it is empty"
        raise BadPickle(f"no torch file: {what}", fix="download the file again")
    try:
        archive = Archive(file, budget.charge)
        if "constants.pkl" in archive.members:
            raise BadPickle("it is a TorchScript program; vLLM reads state dicts only", fix=SAVE_STATE)
        _check_version(archive)
        raw = archive.read("data.pkl", MAX_PICKLE)
        budget.charge(len(raw) // 256)
    except BadArchive as error:
        raise BadPickle(str(error)) from None
    top = _state_dict(raw, budget)
    return top, {n.removeprefix("data/"): member.size for n, member in archive.members.items() if n.startswith("data/")}


def _check_version(archive: Archive) -> None:
    """Torch reads versions 1 to 10, as text that begins with the number. Raises BadArchive."""
    name = next((name for name in ("version", ".data/version") if name in archive.members), None)
    if name is None:
        raise BadArchive("the archive lacks the member `version` of every torch file")
    text = archive.read(name, _MAX_VERSION)
    number = re.match(rb"\s*\+?(\d+)", text)
    if not number or not 1 <= int(number[1]) <= 10:
        raise BadArchive(f"its format version is {shown(text.decode('latin-1'))!r}; torch reads 1 to 10")


def _state_dict(program: bytes, budget: Budget) -> dict[str, object]:
    """What the program makes. Raises BadPickle, for an unsafe program whatever else is wrong with it."""
    machine = Machine(budget)
    try:
        top = machine.run(program)
    except BadPickle:
        if not machine.unsafe:
            raise
    if machine.unsafe:
        raise BadPickle(
            f"it wants to call {', '.join(some(machine.unsafe))}, which no state dict needs; nothing was run",
            "pickle-unsafe",
            "do not load it; take the weights from a source you trust, as safetensors",
            machine.unsafe,
        )
    if machine.unsupported:
        raise BadPickle(
            f"it uses the pickle instruction {machine.unsupported}; vLLM calls torch.load(weights_only=True), which "
            "reads protocol 2 only",
            fix="save it again with torch.save(..., pickle_protocol=2), the default",
        )
    if not isinstance(top, dict):
        raise BadPickle("it does not hold a state dict", fix=SAVE_STATE)
    for key in top:
        if not isinstance(key, str):
            name = shown(repr(key[:20] if isinstance(key, bytes) else key))
            raise BadPickle(f"its state dict has the key {name}, which is no name", fix=SAVE_STATE)
    return top


def _entries(top: dict[str, object], file: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    tensors: dict[str, Tensor] = {}
    other: dict[str, object] = {}
    for key, value in top.items():
        if isinstance(value, Array):
            tensors[key] = Tensor(key, value.dtype, value.shape, file)
        elif value is None or isinstance(value, bool | int | float):
            other[key] = value
        elif isinstance(value, str):
            other[key] = shown(value)
        elif isinstance(value, dict | list | tuple):
            kind = next(kind for kind in (dict, list, tuple) if isinstance(value, kind)).__name__
            other[key] = f"{kind} of {counted(len(value), 'entry').replace('entrys', 'entries')}"
        else:
            other[key] = "object"
    return tensors, other


def _wrong_data(top: dict[str, object], sizes: dict[str, int], label: str) -> list[Finding]:
    """Tensors whose storage is absent from the archive, or of another size than it should be: torch refuses both."""
    short: list[tuple[str, Array, int]] = []
    long: list[tuple[str, Array, int]] = []
    for name, value in top.items():
        if isinstance(value, Array):
            there = sizes.get(value.storage.key.casefold(), -1)
            if there != value.storage.nbytes:
                (short if there < value.storage.nbytes else long).append((name, value, there))
    findings = []
    for bad, code, what, fix in (
        (short, "file-truncated", "without their data", "download the file again"),
        (long, "pickle-invalid", "with more data than their storage has", SAVE_AGAIN),
    ):
        if bad:
            offenders = [_size(*each) for each in bad[:SHOWN]]
            message = f"{counted(len(bad), 'tensor')} of {label} {what}: {offenders[0]}"
            findings.append(Finding.error(code, message, offenders, fix))
    return findings


def _size(name: str, array: Array, there: int) -> str:
    has = "is not in the file" if there < 0 else f"has {there:,} of {array.storage.nbytes:,} bytes"
    return f"{shown(name)}: {array.dtype} {list(array.shape)} needs storage {shown(array.storage.key)}, which {has}"
