"""Torch files: the reader against torch.load(weights_only=True), which is what vLLM calls. What the reader accepts,
torch loads with the same names, dtypes and shapes, or refuses.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import random
import struct
import warnings
from collections import OrderedDict
from typing import Any

import torch

from fuzzing import Target, mutated
from fuzzing.archives import archive, odd_archive
from quantserve.checkpoint.data import DTYPE_BITS, Tensor
from quantserve.checkpoint.pickle_machine import DTYPES, STORAGES
from quantserve.checkpoint.pickles import read_pickle

NAMES = ["a", "b", "model.layers.0.q_proj.weight", "é", "\x1b[2J", "", "state_dict", "\ud800", "items"]
TORCH = {safetensors: getattr(torch, name) for name, safetensors in DTYPES.items()}
GLOBALS = [
    "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "torch Size",
    "torch._utils _rebuild_tensor", "torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state",
    "torch device", "torch float16", "torch int8", "torch FloatStorage", "torch.storage UntypedStorage", "os system",
    "torch Tensor", "builtins set", "collections Counter", "torch.nn.parameter Parameter", "_codecs encode",
    "torch._utils _rebuild_qtensor", "torch.serialization _get_layout",
]  # fmt: skip

PIECES = [
    b"0", b"1", b"2", b"(", b"}", b"]", b")", b"N", b"K\x02", b"s", b"u", b"a", b"e", b"b", b"R", b"Q", b"t", b"\x85",
    b"\x86", b"h\x00", b"q\x00", b"\x94", b".",
]  # fmt: skip
MEMBERS = [
    b"DATA.PKL", b"data.pkl", b"Data.pkl", b"Version", b"constants.pkl", b"data.pkl\0x", b"data\\0", b"../data.pkl",
    b"data/0", b"DATA/0", b"data/a",
]  # fmt: skip


# --- programs ---------------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    if 0 <= value < 256:
        return bytes([75, value])
    return (
        b"J" + struct.pack("<i", value)
        if -(2**31) <= value < 2**31
        else b"\x8a\x09" + value.to_bytes(9, "little", signed=True)
    )


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def call(name: str, *arguments: bytes) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n(" + b"".join(arguments) + b"tR"


EMPTY = call("collections OrderedDict")


class Writer:
    """Programs as torch.save writes them, and near them. Keeps which storages the archive needs."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.storages: dict[str, int] = {}
        self.puts = 0

    def value(self, depth: int = 0) -> bytes:
        chance = self.chance
        match chance.randrange(14 if depth < 3 else 8):
            case 0:
                return number(chance.choice([0, 1, -1, 300, 2**31, 2**62, -(2**63)]))
            case 1:
                return chance.choice([b"N", b"\x88", b"\x89", b"G" + struct.pack(">d", chance.random())])
            case 2:
                return text(chance.choice(NAMES))
            case 3:
                return b"c" + chance.choice(GLOBALS).replace(" ", "\n").encode() + b"\n"
            case 4 if self.puts:
                return b"h" + bytes([chance.randrange(self.puts)])
            case 5:
                return b"U\x03abc"
            case 6 | 7 | 8:
                return self.tensor()
            case 9:
                return b"(" + b"".join(self.value(depth + 1) for _ in range(chance.randint(0, 3))) + b"t"
            case 10:
                return b"](" + b"".join(self.value(depth + 1) for _ in range(chance.randint(0, 3))) + b"e"
            case 11:
                return self.dictionary(depth + 1)
            case 12:
                return call(chance.choice(GLOBALS), *(self.value(depth + 1) for _ in range(chance.randint(0, 4))))
            case _:
                return call(
                    "torch._utils _rebuild_parameter_with_state",
                    self.tensor(),
                    b"\x88",
                    EMPTY,
                    self.dictionary(depth + 1),
                )

    def dictionary(self, depth: int) -> bytes:
        chance = self.chance
        made = chance.choice([b"}", EMPTY]) + self.put()
        items = [
            text(chance.choice(NAMES)) + (self.tensor() if chance.random() < 0.7 else self.value(depth))
            for _ in range(chance.randint(0, 4))
        ]
        made += b"(" + b"".join(items) + b"u"
        if chance.random() < 0.1:
            made += chance.choice([b"}", b"}" + text("_metadata") + EMPTY + b"s", self.value(depth)]) + b"b"
        return made

    def put(self) -> bytes:
        if self.puts > 250 or self.chance.random() < 0.3:
            return b""
        self.puts += 1
        return b"q" + bytes([self.puts - 1])

    def storage(self, count: int) -> bytes:
        chance = self.chance
        key = chance.choice([str(len(self.storages)), "0", "1", "A"])
        kind = chance.choice(list(STORAGES)) if chance.random() < 0.9 else "UntypedStorage"
        size = count * (8 if kind == "UntypedStorage" else DTYPE_BITS[STORAGES[kind]] // 8)
        if key not in self.storages or chance.random() < 0.05:
            self.storages[key] = size
        module = "torch.storage" if kind == "UntypedStorage" else "torch"
        count = size if kind == "UntypedStorage" else count
        return (
            b"(" + text("storage") + f"c{module}\n{kind}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"
        )

    def tensor(self) -> bytes:
        chance = self.chance
        shape = tuple(chance.choice([0, 1, 2, 3, 5]) for _ in range(chance.randint(0, 3)))
        stride: list[int] = []
        count = 1
        for size in reversed(shape):
            stride.insert(0, count)
            count *= size
        offset = chance.choice([0, 0, 0, 1])
        storage = self.storage(count + offset if chance.random() < 0.95 else count // 2)
        if chance.random() < 0.05:
            shape = tuple(chance.choice([0, 1, 2, 7, -1, 2**40]) for _ in shape)
        where = [storage + self.put(), number(offset), numbers(shape), numbers(tuple(stride))]
        match chance.randrange(6):
            case 0:
                dtype = f"ctorch\n{chance.choice(list(DTYPES))}\n".encode()
                made = call("torch._utils _rebuild_tensor_v3", *where, b"\x89", EMPTY, dtype)
            case 1:
                made = call(
                    "torch._utils _rebuild_parameter",
                    call("torch._utils _rebuild_tensor_v2", *where, b"\x89", EMPTY),
                    b"\x89",
                    EMPTY,
                )
            case _:
                made = call("torch._utils _rebuild_tensor_v2", *where, b"\x89", EMPTY)
        return made + self.put()

    def program(self) -> bytes:
        made = self.dictionary(0) + text(self.chance.choice(NAMES)) + self.tensor() + b"s"
        return b"\x80\x02" + made + b"."


def changed(chance: random.Random, program: bytes) -> bytes:
    """A program with instructions removed, repeated, moved or put in."""
    try:
        starts = [at for _, _, at in pickletools.genops(program)]
    except Exception:
        return program
    pieces = [program[a:b] for a, b in zip(starts, [*starts[1:], len(program)], strict=True)]
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(pieces))
        match chance.randrange(5):
            case 0:
                pieces[at] = b""
            case 1:
                pieces.insert(at, chance.choice(pieces))
            case 2:
                other = chance.randrange(len(pieces))
                pieces[at], pieces[other] = pieces[other], pieces[at]
            case 3:
                pieces.insert(at, chance.choice(PIECES))
            case _:
                pieces[at] = mutated(chance, pieces[at], 1)
    return b"".join(pieces)


def make(chance: random.Random) -> bytes:
    """A file: one like torch's, or one with instructions, bytes, members or the archive changed."""
    writer = Writer(chance)
    if chance.random() < 0.1:
        return torches(chance)
    program = writer.program()
    kind = chance.randrange(6)
    if kind == 0:
        program = changed(chance, program)
    elif kind == 1:
        program = mutated(chance, program)
    folder = chance.choice([b"archive", b"x", b"model"])
    members = [(b"data.pkl", program)]
    members += [(f"data/{key}".encode(), bytes(size)) for key, size in writer.storages.items()]
    members += [(b"version", b"3\n"), (b"byteorder", b"little")]
    if kind == 2:
        other = Writer(chance).program()
        extra = chance.choice(MEMBERS)
        members.insert(chance.randrange(len(members) + 1), (extra, other))
    if chance.random() < 0.05:
        del members[chance.randrange(len(members))]
    if chance.random() < 0.3:
        chance.shuffle(members)
    named = [(folder + b"/" + name, data) for name, data in members]
    if chance.random() < 0.05:
        at = chance.randrange(len(named))
        named[at] = (
            chance.choice([b"other/", b"", b"/", b"ARCHIVE/", folder + b"//", folder.upper() + b"/"]) + members[at][0],
            named[at][1],
        )
    raw = odd_archive(chance, named) if kind == 3 else archive(named)
    return mutated(chance, raw, 2) if kind == 4 else raw


def torches(chance: random.Random) -> bytes:
    """A file of torch.save itself, perhaps with bytes changed."""
    state: dict[str, Any] = OrderedDict() if chance.random() < 0.5 else {}
    base = torch.zeros(60)
    for name in chance.sample(NAMES, chance.randint(0, 4)):
        shape = [chance.choice([0, 1, 2, 3]) for _ in range(chance.randint(0, 3))]
        state[name] = chance.choice(
            [
                torch.zeros(shape, dtype=chance.choice(list(TORCH.values()))),
                base[: chance.randint(0, 60)],
                torch.nn.Parameter(torch.zeros(2)),
                3,
                "x",
                None,
                {"a": base},
            ]
        )
    buffer = io.BytesIO()
    torch.save(state, buffer, pickle_protocol=chance.choice([2, 2, 2, 3, 4]))
    return mutated(chance, buffer.getvalue(), 2) if chance.random() < 0.5 else buffer.getvalue()


def judge(raw: bytes) -> str:
    """Compare the reader with torch, for a file the reader accepts."""
    tensors, _, findings = read_pickle(io.BytesIO(raw), "w.bin")
    assert all(finding.message.isprintable() for finding in findings)
    if findings:
        return f"refused ({findings[0].code})"
    assert tensors
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        pickle.UnpicklingError,
        ValueError,
        TypeError,
        AssertionError,
        AttributeError,
        KeyError,
        EOFError,
        IndexError,
        OSError,
    ) as error:
        return f"accepted, torch refuses ({type(error).__name__})"
    assert described(tensors) == {
        name: (value.dtype, tuple(value.shape)) for name, value in loaded.items() if isinstance(value, torch.Tensor)
    }
    return "accepted"


def described(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (TORCH[tensor.dtype], tensor.shape) for name, tensor in tensors.items()}


TARGET = Target("pickles", make, judge)
