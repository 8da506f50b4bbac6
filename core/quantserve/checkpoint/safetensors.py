"""The header of a safetensors file: 8 bytes little-endian length, then JSON of name -> dtype, shape, offsets.

Applies the rules of the safetensors library itself (version 0.8), so a file that passes here is one it opens, and says
with numbers what is wrong with one that does not.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import BinaryIO, Final, NamedTuple, TypeGuard

from quantserve.checkpoint.data import DTYPE_BITS, Tensor
from quantserve.checkpoint.text import BadJson, counted, parse_json, shown, some
from quantserve.finding import Finding

MAX_HEADER: Final = 100_000_000
"""Bytes; the limit of the safetensors library."""

MAX_COUNT: Final = 2**64
FIRST_READ: Final = 100_000
"""Bytes; holds the whole header of nearly every file, so a remote one takes one request."""

_FORMATS: Final = (
    (b"PK\x03\x04", "a zip archive, perhaps a renamed torch file"),
    (b"\x80\x02", "a Python pickle"),
    (b"GGUF", "a GGUF file"),
    (b"<", "an HTML or XML page, perhaps a failed download"),
)
AGAIN: Final = "download the file again"


class Header(NamedTuple):
    """What a header holds, ``__metadata__`` included, and what is wrong with it."""

    tensors: dict[str, Tensor]
    findings: list[Finding]
    metadata: Mapping[str, str] = MappingProxyType({})


def read_header(file: BinaryIO, name: str, size: int) -> Header:
    """Tensors of one file and what is wrong with it.

    Tensors whose dtype and shape are known are returned even when offsets or the file size are wrong.

    Args:
        file: opened at its start. OSError while reading is left to the caller.
        name: shown in findings and stored in each `Tensor`.
        size: bytes of the whole file, -1 when unknown.
    """
    start = file.read(8)
    if len(start) < 8:
        what = "is empty" if not start else f"has {counted(len(start), 'byte')}, less than the 8 of the length field"
        return _broken("header-truncated", f"{shown(name)} {what}", name)
    (length,) = struct.unpack("<Q", start)
    if start.startswith(b"version "):
        return _broken(
            "lfs-pointer",
            f"{shown(name)} is a Git LFS pointer of {counted(max(size, 0), 'byte')}, not the weights",
            name,
            "fetch the real file with `git lfs pull`, or download the model with `hf download`",
        )
    if length > MAX_HEADER:
        guess = next((f"; it looks like {what}" for magic, what in _FORMATS if start.startswith(magic)), "")
        return _broken(
            "header-oversized",
            f"{shown(name)} declares a header of {length:,} bytes; the format allows {MAX_HEADER:,}{guess}",
            name,
        )
    if 0 <= size < 8 + length:
        return _short(name, length, size - 8)
    raw = file.read(length)
    if len(raw) < length:
        return _short(name, length, len(raw))
    return parse_header(raw, name, size - 8 - length if size >= 0 else None)


def _broken(code: str, message: str, name: str, fix: str = AGAIN) -> Header:
    return Header({}, [Finding.error(code, message, some([name]), fix)])


def _short(name: str, length: int, there: int) -> Header:
    message = f"{shown(name)} declares a header of {length:,} bytes but ends after {there:,} of them"
    return _broken("header-truncated", message, name)


def parse_header(raw: bytes, name: str, data_bytes: int | None) -> Header:
    """Check the JSON of a header against the bytes that follow it (None: unknown)."""
    try:
        header = parse_json(raw, strict=True)
        if not isinstance(header, dict):
            raise BadJson("it is not an object")
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not (
            isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
        ):
            raise BadJson("__metadata__ is not an object of strings")
    except BadJson as error:
        return _broken("header-invalid", f"the header of {shown(name)} is not valid: {error}", name)

    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int, str]] = []
    invalid: list[str] = []
    offsets: list[str] = []
    for key, entry in header.items():
        tensor = _tensor(key, entry, name)
        if isinstance(tensor, str):
            invalid.append(tensor)
            continue
        tensors[key] = tensor
        span = entry.get("data_offsets")
        if not _counts(span) or len(span) != 2:
            offsets.append(f"{shown(key)}: data_offsets are not two numbers from 0")
        elif span[1] - span[0] != tensor.nbytes:
            offsets.append(
                f"{shown(key)}: {tensor.dtype} {list(tensor.shape)} takes {tensor.nbytes:,} bytes, "
                f"its offsets span {span[1] - span[0]:,}"
            )
        else:
            spans.append((span[0], span[1], key))
    findings = []
    if invalid:
        findings.append(_several("tensor-invalid", name, "cannot be read", invalid))
    if not invalid and not offsets:
        end = _gaps(spans, offsets)
        if data_bytes is not None and not offsets and end != data_bytes:
            findings.append(_wrong_size(name, end, data_bytes))
    if offsets:
        findings.append(_several("tensor-offsets", name, "with wrong data_offsets", offsets))
    return Header(tensors, findings, metadata or {})


def _counts(value: object) -> TypeGuard[list[int]]:
    """True for a list of integers from 0 below 2**64 (bool is not an integer here)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < MAX_COUNT for item in value)


def _tensor(key: str, entry: object, file: str) -> Tensor | str:
    """The tensor, or what is wrong with its description."""
    if not isinstance(entry, dict):
        return f"{shown(key)}: not an object"
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return f"{shown(key)}: unknown dtype {shown(dtype) if isinstance(dtype, str) else 'of no string'}"
    if not _counts(shape):
        return f"{shown(key)}: the shape is not a list of numbers from 0"
    bits = 1
    for factor in (*shape, DTYPE_BITS[dtype]):  # in the library's order: what a zero comes too late for is refused
        bits *= factor
        if bits >= MAX_COUNT:
            return f"{shown(key)}: the shape has more than 2^64 bits"
    if bits % 8:
        return f"{shown(key)}: {dtype} of this shape is not a whole number of bytes"
    return Tensor(key, dtype, tuple(shape), file)


def _gaps(spans: list[tuple[int, int, str]], problems: list[str]) -> int:
    """Check that the spans lie one after the other from 0; returns the end of the last."""
    end, before = 0, ""
    for start, stop, key in sorted(spans):
        if start > end:
            problems.append(f"{shown(key)}: begins at {start:,}, leaving {start - end:,} bytes unused")
        elif start < end:
            problems.append(f"{shown(key)}: begins at {start:,}, {end - start:,} bytes inside {shown(before)}")
        end, before = max(stop, end), key
    return end


def _wrong_size(name: str, needed: int, there: int) -> Finding:
    if there < needed:
        return Finding.error(
            "file-truncated",
            f"{shown(name)} is cut off: {there:,} of {needed:,} bytes of tensor data are there",
            some([name]),
            AGAIN,
        )
    return Finding.error(
        "file-trailing-data",
        f"{shown(name)} has {there - needed:,} bytes after its last tensor (data end at {needed:,} of {there:,})",
        some([name]),
        AGAIN,
    )


def _several(code: str, name: str, verb: str, problems: list[str]) -> Finding:
    message = f"{counted(len(problems), 'tensor')} of {shown(name)} {verb}: {problems[0]}"
    return Finding.error(code, message, some(problems), "write the file again with the safetensors library")
