"""Containers other than safetensors: what a plugin's reader gets and gives, and which of several files is read.

One file, or files numbered ``NAME-00001-of-00003.SUFFIX``, is a whole model, and a folder often has many of
them. A choice names one: ``folder:Q4_K_M``, ``org/name:Q4_K_M`` or the file itself.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Final

from quantserve.checkpoint.data import Tensor
from quantserve.checkpoint.source import Source
from quantserve.checkpoint.text import counted, shown, some
from quantserve.checkpoint.weights import weight_names
from quantserve.errors import CheckpointError
from quantserve.finding import Finding
from quantserve.system.homes import expand, parted

_NUMBER: Final = re.compile(r"-\d{1,6}-of-\d{1,6}(?=\.\w+$)")


class BadContainer(ValueError):
    """A file that is damaged, cut off or not what its suffix says; the message says how, with the numbers."""


@dataclass(frozen=True)
class Contents:
    """What the files of one model say, without their weights.

    Attributes:
        config: what config.json would hold; empty where the folder's config.json counts.
        tensors: each with its file, named as in transformers; `Tensor.stored` is needed for dtypes that safetensors
            does not have.
        tokenizer: facts as in `Checkpoint.tokenizer`; empty where the folder's tokenizer files count.
        metadata: further texts, for `Checkpoint.metadata`.
        problems: what is wrong with the files; codes begin with the plugin's name.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Iterable[Tensor] = ()
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Reader:
    """How the files of one kind of container are read.

    Attributes:
        suffixes: of their names, ``(".gguf",)``.
        read: called as ``read(source, names)`` with the files of one model in the order of their numbers. Reads headers
            only, through ``source.open(name)``: on the hub every read is a range request. Raises `BadContainer` for a
            damaged file.
    """

    suffixes: tuple[str, ...]
    read: Callable[[Source, tuple[str, ...]], Contents]


def container_file(source: str, suffixes: Collection[str]) -> Path | None:
    """The existing file that `source` names, if it has one of the suffixes."""
    path = expand(source)
    try:
        return path if path.suffix in suffixes and path.is_file() else None
    except (OSError, ValueError):
        return None


def containers(files: Iterable[str], suffixes: Collection[str]) -> list[str]:
    """The files of a checkpoint that have one of the suffixes."""
    return sorted(name for name in files if PurePath(name).suffix in suffixes)


def chosen(source: Source, suffixes: Collection[str], choice: str, name: str) -> tuple[str, ...]:
    """The container files of the model to read; none where there is no choice and the core reads the weights itself.

    Args:
        source: the files.
        suffixes: of the installed readers.
        choice: a file name, or a part of one between characters that are not of a word (``Q4_K_M``).
        name: of the checkpoint, for messages.

    Raises:
        CheckpointError: the choice fits no file or several, or there are several and no choice.
    """
    there = containers(source.files, suffixes)
    if not choice and (not there or weight_names(source.files)):
        return ()
    if not there:
        holds = ", ".join(some(sorted(source.files)[:8])) or "no files"
        raise CheckpointError(
            f"{shown(name)}: {shown(choice)!r} chooses one of several files, and none here is of a kind that an "
            f"installed plugin reads; it holds {holds}\n  fix: leave :{shown(choice)} out, or install the plugin for "
            "these files; `quantserve list` shows the plugins that failed"
        )
    models = defaultdict(list)
    for file in there:
        models[_NUMBER.sub("", file)].append(file)
    word = re.compile(rf"(?<!\w){re.escape(choice)}(?!\w)", re.IGNORECASE)
    fitting = [model for model, parts in models.items() if choice in (model, *parts)] if choice else list(models)
    fitting = fitting or [model for model in models if word.search(model)]
    if len(fitting) == 1:
        return tuple(models[fitting[0]])
    listed = ", ".join(some((fitting or list(models))[:8]))
    if not fitting:
        what = f"no model in it is called {shown(choice)!r}; it holds {listed}"
    elif choice:
        what = f"{counted(len(fitting), 'model')} in it fit {shown(choice)!r}: {listed}"
    else:
        what = f"it holds {counted(len(fitting), 'model')}: {listed}"
    place = parted(name)[0]
    raise CheckpointError(
        f"{shown(name)}: {what}\n  fix: name one, such as {shown(place)}:{shown((fitting or [*models])[0])}"
    )
