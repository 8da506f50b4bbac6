"""Finds the field of a client's request body that an error is about, as the path ``messages[0].role``."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

Path = tuple[str | int, ...]
_PROBES: Final = 3
"""Errors that are compared with a part of the body."""
_SEARCHED: Final = 1000
"""Objects and lists in which a name is searched."""
_LONGEST_PATH: Final = 200
_PART: Final = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
_WORD: Final = re.compile(r"\w+")


@dataclass(frozen=True)
class Place:
    """A place in a body that a location of pydantic leads to.

    Attributes:
        path: keys and indices from the start of the body.
        branches: for each union on the path, outermost first: its path and the branch that was tried.
        value: at that place; for a missing field, the object that lacks it.
    """

    path: Path
    branches: tuple[tuple[Path, str], ...]
    value: Any


def written(path: Path) -> str:
    """A path as text: ``messages[0].role``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    return text if len(text) <= _LONGEST_PATH else text[:_LONGEST_PATH] + "..."


def place(error: Mapping[str, Any], value: Any, start: Path = ()) -> Place:
    """The place of an error of pydantic.

    A location also has names of union branches and of validators. Keys and indices of the client's body belong to the
    path; a missing field is not in the body, and is the last part.

    Args:
        error: with its location in `value`.
        value: a part of the body.
        start: the path to that part.
    """
    path, branches = start, []
    parts = [part for index, part in enumerate(error["loc"]) if index or part != "body"]
    for index, part in enumerate(parts):
        if _has(value, part):
            path, value = (*path, part), value[part]
        elif error["type"] == "missing" and index == len(parts) - 1 and isinstance(value, Mapping):
            path = (*path, str(part))
        else:
            branches.append((path, str(part)))
    return Place(path, tuple(branches), value)


def origin(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[Path, Any]:
    """The part of the body that the locations of one validation are relative to: its path and its value.

    For most errors that is the body. vLLM's types have fields that are validated when they are read, and whose errors
    have locations in that field, without the path to it. It is found by the value that was refused.
    """
    probes = [error for error in errors if "input" in error][:_PROBES]
    if not probes or any(_fits(error, body) for error in probes):
        return (), body
    found = (part for part in _containers(body) if all(_fits(error, part[1]) for error in probes))
    return next(found, ((), body))


def iterated(errors: Sequence[Mapping[str, Any]], body: Any) -> Path | None:
    """The path to a text or an object in the place of a list: pydantic validates its characters or keys."""
    index, refused = next(((error["loc"][0], error.get("input")) for error in errors if error["loc"]), (None, None))
    if not isinstance(index, int) or not isinstance(refused, str):
        return None
    for path, value in _containers(body):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(part, str | dict) and next(islice(part, index, None), None) == refused:
                return (*path, key)
    return None


def known(param: str, body: Any) -> str:
    """A path without its last parts that are not in the body; a name alone is kept, as it may be missing."""
    path = tuple(name or int(index) for name, index in _PART.findall(param))
    for index, part in enumerate(path):
        if not _has(body, part):
            return written(path[:index]) or (param if len(path) == 1 else written(path[:1]))
        body = body[part]
    return param


def mentioned(message: str, body: Any) -> str | None:
    """The path to the field with an underscore in its name that a message mentions first."""
    words = {word: index for index, word in reversed(list(enumerate(_WORD.findall(message)))) if "_" in word}
    objects = ((path, value) for path, value in islice(_containers(body), _SEARCHED) if isinstance(value, dict))
    paths = [(*path, key) for path, value in objects for key in value if key in words]
    return written(min(paths, key=lambda path: (words[path[-1]], len(path)))) if paths else None


def _has(value: Any, part: object) -> bool:
    if isinstance(part, int):
        return isinstance(value, list) and part < len(value)
    return isinstance(value, Mapping) and part in value


def _fits(error: Mapping[str, Any], value: Any) -> bool:
    """Whether an error's location leads to the value that it refuses."""
    found = place(error, value)
    if not found.path:
        return False
    try:
        return type(found.value) is type(error["input"]) and bool(found.value == error["input"])
    except RecursionError:
        return False


def _containers(body: Any) -> Iterator[tuple[Path, Any]]:
    """All objects and lists in a body, outer ones first."""
    waiting: deque[tuple[Path, Any]] = deque([((), body)] if isinstance(body, dict | list) else ())
    while waiting:
        path, value = waiting.popleft()
        yield path, value
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        waiting.extend(((*path, key), part) for key, part in parts if isinstance(part, dict | list))
