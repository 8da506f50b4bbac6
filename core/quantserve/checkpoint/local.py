"""A checkpoint folder on this machine, or a snapshot in the HF cache."""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from quantserve.checkpoint.data import Location
from quantserve.checkpoint.text import shown, some
from quantserve.errors import CheckpointError
from quantserve.finding import Finding
from quantserve.system.homes import snapshot_in, url_mistake


@dataclass
class Folder:
    """The regular top-level files of a folder; links are followed. See `Source`."""

    path: Path
    location: Location = "local"
    revision: str | None = None
    files: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        """List the folder. Raises CheckpointError when it cannot be listed."""
        try:
            entries = sorted(os.scandir(self.path), key=lambda entry: entry.name)
        except OSError as error:
            raise CheckpointError(
                f"cannot read the folder {shown(str(self.path))}: {error.strerror}\n  fix: check its permissions"
            ) from None
        dangling, special, outside = [], [], []
        home = self._home()
        for entry in entries:
            try:
                status = entry.stat()
                if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(home):
                    outside.append(entry.name)
            except OSError:
                dangling.append(entry.name)
                continue
            if stat.S_ISREG(status.st_mode):
                self.files[entry.name] = status.st_size
            elif _matters(entry.name):
                special.append(entry.name)
        self._report(dangling, special, [name for name in outside if _matters(name)])

    def _home(self) -> Path:
        """The folder links may point into: the whole repository folder for a snapshot of the HF cache."""
        real = Path(os.path.realpath(self.path))
        return real.parent.parent if real.parent.name == "snapshots" else real

    def _report(self, dangling: list[str], special: list[str], outside: list[str]) -> None:
        if dangling:
            self.findings.append(
                Finding.error(
                    "file-unreadable",
                    f"links to files that do not exist: {', '.join(some(dangling))}",
                    some(dangling),
                    "download the files again",
                )
            )
        if special:
            self.findings.append(
                Finding.error(
                    "file-unreadable",
                    f"folders, pipes or devices where files are expected: {', '.join(some(special))}",
                    some(special),
                    "replace them by the files of the model",
                )
            )
        if outside:
            self.findings.append(
                Finding.warning(
                    "symlink-outside",
                    f"links that leave the folder: {', '.join(some(outside))}; vLLM follows them",
                    some(outside),
                    "if that is not intended, replace the links by the files",
                )
            )

    def prefetch(self, sizes: Iterable[tuple[str, int]]) -> None:
        """Nothing to do: local files are read when they are opened."""

    def open(self, name: str) -> BinaryIO:
        """Open one of `files`."""
        return (self.path / name).open("rb")


def _matters(name: str) -> bool:
    return name.endswith((".json", ".safetensors", ".bin", ".pt"))


def find_folder(source: str) -> Path | None:
    """The existing folder `source` names, else None.

    Raises CheckpointError when `source` is a file, or can only be a path (``./x``, ``a/b/c``) and is missing.
    """
    try:
        path = Path(source).expanduser()  # raises where `expand` keeps the ~
        if path.is_dir():
            return snapshot_in(path)
        exists = path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"cannot use {shown(source)!r} as a model folder: {reason}\n  fix: name a folder or a hub id, org/name"
        ) from None
    if exists:
        raise CheckpointError(f"{shown(source)} is a file, not a model folder\n  fix: {_file_fix(path)}")
    if _only_a_path(source):
        raise CheckpointError(missing(source, path))
    return None


def _file_fix(path: Path) -> str:
    if path.suffix not in ("", ".safetensors", ".bin", ".pt", ".json"):
        kind = shown(path.suffix[1:].upper())
        install = "`pip install 'quantserve[gguf]'`" if kind == "GGUF" else "install one that does"
        return (
            f"no installed plugin reads {kind} files: {install}, or name a folder "
            "with config.json and *.safetensors; `quantserve list` shows the plugins that failed"
        )
    return f"name the folder that holds config.json and the weights, perhaps {shown(str(path.parent))}"


def _only_a_path(source: str) -> bool:
    return (
        source.startswith(("/", "./", "../", "~"))
        or source in {".", ".."}
        or source.partition("@")[0].count("/") > 1
        or ("\\" in source or source.endswith("/"))
    )


def missing(source: str, path: Path) -> str:
    """Say that a folder does not exist, how far its path does, and what is there instead."""
    if mistake := url_mistake(source):
        return f"{shown(source)}: {mistake}"
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    first = path.parts[len(parent.parts)] if len(path.parts) > len(parent.parts) else path.name
    try:
        names = sorted(entry.name for entry in os.scandir(parent) if entry.is_dir() and entry.name[0] != ".")
    except OSError:
        names = []
    close = difflib.get_close_matches(first, names, n=3) or names[:5]
    where = shown(str(parent)) if str(parent) != "." else "the current folder"
    there = f"it holds {', '.join(some(close))}" if close else "it holds no folders"
    return (
        f"no model folder {shown(source)}: {where} has no {shown(first)!r}, {there}\n"
        "  fix: correct the path, or name a model of the Hub as org/name"
    )


def nothing_here(folder: Folder) -> str:
    """Say that a folder holds no model, and which folders inside it do."""
    inside = sorted(child.name for child in folder.path.iterdir() if os.path.isfile(child / "config.json"))
    names = list(folder.files)
    holds = f"it holds {', '.join(some(names[:8]))}" if names else "it holds no files"
    fix = (
        f"name one of the model folders inside: {', '.join(some(inside))}"
        if inside
        else "name the folder that holds config.json and *.safetensors"
    )
    return f"{shown(str(folder.path))} has neither config.json nor weights; {holds}\n  fix: {fix}"
