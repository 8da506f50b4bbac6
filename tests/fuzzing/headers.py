"""Safetensors files: the reader against the safetensors library. Both accept or both refuse; names, dtypes, shapes and
sizes are the same.
"""

from __future__ import annotations

import io
import json
import random
import struct
from typing import Any

import safetensors

from fuzzing import Target, mutated
from quantserve.checkpoint.data import DTYPE_BITS
from quantserve.checkpoint.safetensors import read_header

DTYPES = sorted(DTYPE_BITS)
NAMES = [
    "a",
    "b",
    "model.layers.0.q_proj.weight",
    "",
    "é",
    "\n",
    "\x1b[2J",
    "__metadata__",
    "\U0001f600",
    "\ufeff",
    "dtype",
]
NUMBERS: list[Any] = [
    0, 1, 2, 3, 8, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**25, -1, -0.0, 0.5, 1.0, 1e2, True, None,
    "1",
]  # fmt: skip
SPACE = ["", "", "", " ", "\n", "\t", "\r", "\x0b", "\xa0", "\ufeff", "\0"]


def make(chance: random.Random) -> bytes:
    """A file: a sound one, one with a value replaced, one with its text changed, or one with its bytes changed."""
    if chance.random() < 0.02:
        return chance.randbytes(chance.randint(0, 300))
    header, end = _sound(chance)
    kind = chance.randrange(8)
    if kind < 4:
        for _ in range(chance.randint(0, 2) if kind else 0):
            _replace(chance, header)
    text = _text(chance, header) if kind == 4 else json.dumps(header, ensure_ascii=chance.random() < 0.5)
    raw = text.encode("utf-8", "surrogatepass")
    if kind == 5:
        raw = mutated(chance, raw)
    if chance.random() < 0.1:
        raw += b" " * chance.randint(1, 9)
    declared = len(raw) + (chance.choice([-1, 1, 8, 2**40]) if chance.random() < 0.03 else 0)
    data = max(0, end + (chance.choice([-1, 1, 8]) if chance.random() < 0.08 else 0))
    whole = struct.pack("<Q", max(0, declared)) + raw + bytes(min(data, 4096))
    return mutated(chance, whole, 2) if kind == 6 else whole


def _sound(chance: random.Random) -> tuple[dict[str, Any], int]:
    header: dict[str, Any] = {}
    at = 0
    for name in chance.sample(NAMES, chance.randint(0, 4)):
        dtype = chance.choice(DTYPES)
        shape = [chance.choice([0, 1, 2, 3, 4, 8]) for _ in range(chance.randint(0, 3))]
        bits = DTYPE_BITS[dtype]
        for size in shape:
            bits *= size
        if bits % 8:
            shape, bits = [*shape, 8], bits * 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + bits // 8]}
        at += bits // 8
    header.pop("__metadata__", None)
    at = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if chance.random() < 0.3:
        header["__metadata__"] = {"format": "pt", "\x1b": chance.choice(NAMES)}
    if chance.random() < 0.5:
        header = dict(chance.sample(list(header.items()), len(header)))
    return header, at


def _replace(chance: random.Random, header: dict[str, Any]) -> None:
    places: list[tuple[Any, Any]] = [(header, key) for key in header]
    for entry in header.values():
        if isinstance(entry, dict):
            places += [(entry, key) for key in entry]
            places += [(part, at) for part in entry.values() if isinstance(part, list) for at in range(len(part))]
    if not places:
        header["a"] = chance.choice(NUMBERS)
        return
    place, key = chance.choice(places)
    match chance.randrange(5):
        case 0:
            del place[key]
        case 1:
            place[key] = chance.choice([*DTYPES, "f16", "F15"])
        case 2 if isinstance(place, dict):
            place[chance.choice([*NAMES, "extra"])] = chance.choice([place[key], *NUMBERS])
        case 3 if isinstance(place[key], list):
            place[key].append(chance.choice(NUMBERS))
        case _:
            place[key] = chance.choice([*NUMBERS, [], {}, [1]])


def _text(chance: random.Random, header: dict[str, Any]) -> str:
    """JSON as no library writes it: white space, keys given twice, escapes, numbers in other spellings."""
    parts = []
    for key, value in header.items():
        written = json.dumps(value)
        if chance.random() < 0.2:
            written = written.replace(
                "[0,", chance.choice(["[00,", "[0.0,", "[0e0,", "[-0,", "[+0,", "[0 ,", "[0,0,"]), 1
            )
        if chance.random() < 0.1:
            written = written.replace(
                '"dtype"', chance.choice(['"\\u0064type"', '"dtype":"F16","dtype"', "'dtype'"]), 1
            )
        name = json.dumps(key)
        if chance.random() < 0.1:
            name = chance.choice(
                ['"\\ud800"', '"\\ud83d\\ude00"', '"\\/"', '"\\x61"', '"a\tb"', '"\\u0000"', '"\ud800"']
            )
        parts.append(chance.choice(SPACE) + name + chance.choice(SPACE) + ":" + chance.choice(SPACE) + written)
        if chance.random() < 0.05:
            parts.append(parts[-1])
    return chance.choice(SPACE) + "{" + ",".join(parts) + chance.choice(["", "", "", ","]) + "}" + chance.choice(SPACE)


def judge(raw: bytes) -> str:
    """Compare the reader with the library."""
    tensors, findings, _ = read_header(io.BytesIO(raw), "m.safetensors", len(raw))
    assert all(finding.message.isprintable() for finding in findings)
    try:
        known = dict(safetensors.deserialize(raw))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        known = None
    if known is None:
        assert findings, "the reader accepts what the library refuses"
        return "refused"
    twice = any("given twice" in finding.message for finding in findings)
    if twice:
        return "refused, a key twice"  # the library takes one of them; which of them is read must not be a guess
    assert not findings, f"the reader refuses what the library accepts: {findings[0].message}"
    assert {name: (t.dtype, list(t.shape), t.nbytes) for name, t in tensors.items()} == {
        name: (entry["dtype"], entry["shape"], len(entry["data"])) for name, entry in known.items()
    }
    return "accepted"


TARGET = Target("headers", make, judge)
