"""An interpreter for the pickle program of a state dict, over inert values.

A pickle is a program. Here a global is a name, and calling one either follows a rule below or makes the file unsafe:
nothing is imported, constructed or called. Python's own Unpickler, restricted, would still take memory for whatever
sizes a program names and hash whatever it nests. What a rule gives is what torch.load(weights_only=True) makes; where
that is not known, the file is refused. Every step is charged to a budget by the work it takes.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final, TypeGuard

from quantserve.checkpoint.data import DTYPE_BITS
from quantserve.checkpoint.text import shown

SAVE_AGAIN: Final = "convert it to safetensors with `quantserve convert`, or save it again with today's torch.save"
MAX_STEPS: Final = 2_000_000
"""Steps for the files of one checkpoint, a few seconds; a 70B checkpoint has about 50,000 instructions."""

MOST_UNSAFE: Final = 10
"""Unsafe things named; a program is not followed further."""

STORAGES: Final = {
    "HalfStorage": "F16", "BFloat16Storage": "BF16", "FloatStorage": "F32", "DoubleStorage": "F64",
    "CharStorage": "I8", "ByteStorage": "U8", "UntypedStorage": "U8", "ShortStorage": "I16", "IntStorage": "I32",
    "LongStorage": "I64", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip
DTYPES: Final = {
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "int8": "I8", "uint8": "U8",
    "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32", "int64": "I64", "uint64": "U64", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64",
}  # fmt: skip


class BadPickle(Exception):
    """A file that is damaged, unsafe, or beyond what a state dict needs; the arguments become a finding."""

    def __init__(self, message: str, code: str = "pickle-invalid", fix: str = SAVE_AGAIN, names: Iterable[str] = ()):
        super().__init__(message)
        self.code, self.fix, self.names = code, fix, tuple(names)


@dataclass(frozen=True, slots=True)
class _Global:
    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class Storage:
    """Where the data of a tensor are: member ``data/KEY`` of the archive, `count` elements of `dtype`."""

    dtype: str
    key: str
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.count * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Array:
    """A tensor that has no name yet."""

    dtype: str
    shape: tuple[int, ...]
    storage: Storage


class _Opaque:
    """The result of something that was not run."""


class _OrderedDict(dict[Any, Any]):
    """What ``collections.OrderedDict()`` makes, the only object whose attributes a state dict sets."""


_MARK: Final = object()
_OPAQUE: Final = _Opaque()


class Budget:
    """What is left of the steps for one checkpoint."""

    def __init__(self, steps: int = MAX_STEPS) -> None:
        self.left = steps

    def charge(self, steps: int) -> None:
        """Take `steps` from it. Raises BadPickle when nothing is left."""
        self.left -= steps
        if self.left < 0:
            raise BadPickle(f"it takes more than {MAX_STEPS:,} steps to read, with the files before it")


@dataclass
class Machine:
    """A pickle interpreter without objects: stack, marks, memo, and rules for a handful of globals.

    Attributes:
        unsafe: what the program wants to call beyond a state dict.
        unsupported: the first instruction that torch.load(weights_only=True) does not know, "" when there is none.
    """

    budget: Budget = field(default_factory=Budget)
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    storages: dict[str, Storage] = field(default_factory=dict)
    unsafe: list[str] = field(default_factory=list)
    unsupported: str = ""

    def run(self, raw: bytes) -> object:
        """Interpret the program; returns what it leaves, with anything unsafe named in `unsafe`."""
        charge = self.budget.charge
        try:
            for opcode, argument, _ in pickletools.genops(raw):
                charge(1)
                if opcode.name == "STOP":
                    return self._pop()
                step = _STEPS.get(opcode.name)
                if step is None:
                    self._refuse(f"pickle instruction {opcode.name}")
                    return None
                if opcode.name not in _SUPPORTED:
                    self.unsupported = self.unsupported or opcode.name
                step(self, argument)
                if len(self.unsafe) == MOST_UNSAFE:
                    return None
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeError, AttributeError) as error:
            raise BadPickle(f"its program is damaged ({type(error).__name__})") from None
        raise BadPickle("its program has no end")

    def _refuse(self, what: str) -> None:
        if what not in self.unsafe:
            self.unsafe.append(what)

    def _pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise BadPickle("its program is damaged (stray mark)")
        return value

    def _to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise BadPickle("its program is damaged (no mark)")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def _push(self, value: object) -> None:
        self.stack.append(value)

    def _push_number(self, value: int) -> None:
        if not -(2**63) <= value < 2**63:
            raise BadPickle("it holds a number of more than 64 bits")
        self.stack.append(value)

    def _push_bytes_as_text(self, value: str) -> None:
        self.stack.append(value.encode("latin1").decode())  # as torch reads the strings of Python 2

    def _mark(self, _: object) -> None:
        self.stack.append(_MARK)

    def _drop(self, _: object) -> None:
        self._pop()

    def _pop_mark(self, _: object) -> None:
        self._to_mark()

    def _tuple_of(self, count: int) -> None:
        items = tuple(self._pop() for _ in range(count))[::-1]
        self.stack.append(items)

    def _make_dict(self, _: object) -> None:
        items = self._to_mark()
        made: dict[Any, Any] = {}
        self.stack.append(made)
        self._set(made, items)

    def _set(self, target: object, items: list[Any]) -> None:
        if len(items) % 2:
            raise BadPickle("its program is damaged (key without value)")
        if target is _OPAQUE:
            return
        if not isinstance(target, dict):
            raise BadPickle("its program is damaged (item of what is no dict)")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, str | bytes):
                self.budget.charge(len(key) // 64)  # equal keys are compared whole
            elif isinstance(key, int | float | None):
                self.budget.charge(len(target) // 8)  # numbers can be chosen so that all collide
            else:  # hashing a deep tuple overflows the C stack
                raise BadPickle(f"a dict has a key of type {type(key).__name__}")
            target[key] = value

    def _set_items(self, count: int | None) -> None:
        items = self._to_mark() if count is None else [self._pop(), self._pop()][::-1]
        self._set(self.stack[-1], items)

    def _append(self, count: int | None) -> None:
        items = self._to_mark() if count is None else [self._pop()]
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif target is not _OPAQUE:
            raise BadPickle("its program is damaged (append to what is no list)")

    def _global(self, name: str | tuple[str, str]) -> None:
        module, _, attribute = name.partition(" ") if isinstance(name, str) else (name[0], "", name[1])
        made = _Global(shown(module), shown(attribute))
        if not _known(made):
            self._refuse(str(made))
        self.stack.append(made)

    def _stack_global(self, _: object) -> None:
        attribute, module = self._pop(), self._pop()
        if not (isinstance(attribute, str) and isinstance(module, str)):
            raise BadPickle("its program is damaged (global without a name)")
        self._global((module, attribute))

    def _persistent(self, _: object) -> None:
        match self._pop():
            case ("storage", _Global() as kind, str() as key, _, int() as count) if (
                kind.name in STORAGES and count >= 0
            ):
                made = self.storages.get(key, Storage(STORAGES[kind.name], key, count))
                if made.count:  # torch loads a storage once, with the type that comes first
                    self.storages[key] = made
                self.stack.append(made)
            case _:
                raise BadPickle("a reference to something that is no storage")

    def _reduce(self, _: object) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(arguments, tuple):
            raise BadPickle("its program is damaged (call without arguments)")
        rule = _RULES.get(str(function)) if isinstance(function, _Global) else None
        if rule is None:
            if isinstance(function, _Global) and _known(function):
                self._refuse(f"{function}()")
            self.stack.append(_OPAQUE)
            return
        self.budget.charge(len(arguments) + sum(len(a) for a in arguments[:5] if isinstance(a, tuple | list | dict)))
        self.stack.append(rule(*arguments))

    def _build(self, _: object) -> None:
        """Attributes of an OrderedDict (`_metadata`), of no use here unless they hide a method."""
        state, target = self._pop(), self.stack[-1]
        if target is _OPAQUE:
            return
        if not (isinstance(target, _OrderedDict) and isinstance(state, dict)):
            raise BadPickle("it sets the state of an object that is no OrderedDict")
        self.budget.charge(len(state))
        if not all(isinstance(name, str) and name.startswith("_") for name in state):
            raise BadPickle("it sets attributes of an OrderedDict other than _metadata")

    def _store(self, index: int | None) -> None:
        if index is None:
            index = len(self.memo)
        if not 0 <= index < MAX_STEPS:
            raise BadPickle("its program is damaged (memo index)")
        self.memo[index] = self.stack[-1]

    def _fetch(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def _duplicate(self, _: object) -> None:
        self.stack.append(self.stack[-1])


def _known(name: _Global) -> bool:
    if name.module in {"torch", "torch.storage"} and name.name in STORAGES:
        return True
    return (name.module == "torch" and name.name in DTYPES) or str(name) in _RULES


def _ordered_dict(*arguments: object) -> object:
    items = arguments[0] if arguments else ()
    if len(arguments) > 1 or not isinstance(items, list | tuple):
        raise BadPickle("an OrderedDict of what are no pairs")
    made = _OrderedDict()
    for pair in items:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise BadPickle("an OrderedDict of what are no pairs")
        made[pair[0]] = pair[1]
    return made


def _size(items: object = ()) -> object:
    if not isinstance(items, list | tuple):
        raise BadPickle("a torch.Size of what are no numbers")
    return tuple(items)


def _array(storage: object, offset: object, size: object, stride: object, *_: object) -> Array:
    return _view(storage, offset, size, stride, "")


def _array_v3(
    storage: object,
    offset: object,
    size: object,
    stride: object,
    grad: object,
    hooks: object,
    dtype: object,
    *_: object,
) -> Array:
    """A tensor whose storage has no type of its own."""
    if not (isinstance(dtype, _Global) and dtype.module == "torch" and dtype.name in DTYPES):
        raise BadPickle("a tensor without dtype")
    return _view(storage, offset, size, stride, DTYPES[dtype.name])


def _view(storage: object, offset: object, size: object, stride: object, dtype: str) -> Array:
    if not (isinstance(storage, Storage) and _counts((offset,)) and _counts(size) and _counts(stride)):
        raise BadPickle("a tensor without storage, offset, shape or strides")
    dtype = dtype or storage.dtype
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    elements: int = prod(size)
    if isinstance(offset, int) and elements:
        needed = (offset + last + 1) * DTYPE_BITS[dtype] // 8
        if needed > storage.nbytes or elements >= 2**60:
            raise BadPickle(
                f"a tensor of shape {list(size[:8])} needs {needed:,} bytes, its storage has {storage.nbytes:,}"
            )
    return Array(dtype, size, storage)


def _parameter(data: object, *rest: object) -> object:
    """A parameter is its data, unless attributes that are set on it replace them."""
    if not isinstance(data, Array):
        raise BadPickle("a parameter of what is no tensor")
    state = (rest[2] if len(rest) > 2 else None) or {}
    if not isinstance(state, dict) or not all(isinstance(v, bool | int | float | str | None) for v in state.values()):
        raise BadPickle("a parameter with attributes that are no plain values")
    return data


def _counts(value: object) -> TypeGuard[tuple[int, ...]]:
    return (
        isinstance(value, tuple)
        and all(type(item) is int and 0 <= item < 2**60 for item in value[:64])
        and (len(value) <= 64)
    )


_RULES: Final[dict[str, Callable[..., object]]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _array,
    "torch._utils._rebuild_tensor_v2": _array,
    "torch._utils._rebuild_tensor_v3": _array_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": _size,
    "torch.device": lambda *_: _OPAQUE,
}

Step = Callable[[Machine, Any], None]


def _steps() -> dict[str, Step]:
    """Pickle instruction -> what it does; an instruction that is not here makes a file unsafe."""
    steps: dict[str, Step] = {
        "PROTO": lambda m, a: None, "FRAME": lambda m, a: None, "MARK": Machine._mark,
        "NONE": lambda m, a: m._push(None), "NEWTRUE": lambda m, a: m._push(True),
        "NEWFALSE": lambda m, a: m._push(False), "EMPTY_DICT": lambda m, a: m._push({}),
        "EMPTY_LIST": lambda m, a: m._push([]), "EMPTY_TUPLE": lambda m, a: m._push(()),
        "TUPLE1": lambda m, a: m._tuple_of(1), "TUPLE2": lambda m, a: m._tuple_of(2),
        "TUPLE3": lambda m, a: m._tuple_of(3), "TUPLE": lambda m, a: m._push(tuple(m._to_mark())),
        "LIST": lambda m, a: m._push(m._to_mark()), "DICT": Machine._make_dict,
        "APPEND": lambda m, a: m._append(1), "APPENDS": lambda m, a: m._append(None),
        "SETITEM": lambda m, a: m._set_items(1), "SETITEMS": lambda m, a: m._set_items(None),
        "GLOBAL": Machine._global, "STACK_GLOBAL": Machine._stack_global, "REDUCE": Machine._reduce,
        "BUILD": Machine._build, "BINPERSID": Machine._persistent, "MEMOIZE": lambda m, a: m._store(None),
        "POP": Machine._drop, "POP_MARK": Machine._pop_mark, "DUP": Machine._duplicate,
    }  # fmt: skip
    steps |= dict.fromkeys(("BINPUT", "LONG_BINPUT", "PUT"), Machine._store)
    steps |= dict.fromkeys(("BINGET", "LONG_BINGET", "GET"), Machine._fetch)
    steps |= dict.fromkeys(("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4"), Machine._push_number)
    steps |= dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), Machine._push_bytes_as_text)
    literals = "BINUNICODE SHORT_BINUNICODE BINUNICODE8 UNICODE STRING BINBYTES SHORT_BINBYTES BINBYTES8 BINFLOAT FLOAT"
    return steps | dict.fromkeys(literals.split(), Machine._push)


_STEPS: Final = _steps()
_SUPPORTED: Final = frozenset({
    "PROTO", "GLOBAL", "REDUCE", "BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "MARK", "TUPLE", "TUPLE1",
    "TUPLE2", "TUPLE3", "NONE", "NEWFALSE", "NEWTRUE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "BININT", "BININT1",
    "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "BINPERSID", "BINGET", "LONG_BINGET", "BINPUT",
    "LONG_BINPUT", "LONG1", "STOP",
})  # fmt: skip
"""What torch.load(weights_only=True) knows, a subset of protocol 2 (torch 2.13, _weights_only_unpickler.py)."""
