"""The output while it is made: a folder beside the destination, which it becomes when it is whole.

.NAME.partial/state.json      what the run was asked for; another run may go on only if it is asked for the same
.NAME.partial/parts/00012     the tensors of a part in safetensors, and what is known of them in 00012.json
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from safetensors.torch import save_file
from torch import Tensor

from quantserve.errors import UsageError

SHARD_BYTES = 5_000_000_000
PART_BYTES = 500_000_000
"""Held in memory by `write_folder`."""
_COPY = 1 << 24


class Draft:
    """A run's output in the making; one process at a time has it.

    Args:
        destination: what it becomes.
        asked: what the run was asked for, as JSON.
        resume: whether to go on with an earlier run.

    Raises:
        UsageError: the destination exists; an earlier run is there and `resume` is not said, or was asked for something
            else; another process works on it; or the folder cannot be made.
    """

    def __init__(self, destination: Path, asked: Mapping[str, Any], resume: bool) -> None:
        must_be_new(destination)
        self.destination = destination
        self.folder = destination.parent / f".{destination.name}.partial"
        self._lock: IO[str] | None = None
        state = self.folder / "state.json"
        try:
            there = json.loads(state.read_text()) if state.exists() else None
        except (OSError, ValueError):
            there = {}
        if there is not None and not resume:
            raise UsageError(
                f"{self.folder} holds a run that did not end\n  fix: add --resume to go on, or remove the folder"
            )
        if there is not None and there != json.loads(json.dumps(asked)):
            keys = (
                ", ".join(sorted(key for key in {*there, *asked} if there.get(key) != asked.get(key))) or "state.json"
            )
            raise UsageError(
                f"{self.folder} holds a run that was asked for something else: {keys} differ\n"
                "  fix: repeat its command with --resume, or remove the folder"
            )
        with disk(self.folder):
            (self.folder / "parts").mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
                raise UsageError(f"{self.folder} is in use by another process\n  fix: wait until it ends") from None
            if there is None:
                write_whole(state, json.dumps(asked, indent=1))

    def done(self, part: str) -> dict[str, Any] | None:
        """What is known of a part that is done, or None."""
        path = self.folder / "parts" / f"{part}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, part: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Keep a part; it is done when its JSON file is there."""
        path = self.folder / "parts" / part
        with disk(path):
            save_whole(path, tensors)
            write_whole(path.with_name(part + ".json"), json.dumps(about))

    def extra(self, name: str) -> Path:
        """A file of the run that is not part of the output."""
        return self.folder / name

    def discard(self) -> None:
        """Remove all that was done, where going on with it can lead nowhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self, parts: Iterable[str], files: Mapping[str, str], copies: Iterable[Path]) -> None:
        """Join the parts to shards, add the other files, and let the folder become the destination.

        Args:
            parts: in the order of the output.
            files: name -> text.
            copies: files to copy.
        """
        whole = self.folder / "whole"
        with disk(whole):
            shutil.rmtree(whole, ignore_errors=True)
            whole.mkdir()
            for path in copies:
                shutil.copyfile(path, whole / path.name)
            for name, text in files.items():
                (whole / name).write_text(text, encoding="utf-8")
            join([self.folder / "parts" / part for part in parts], whole)
            for path in whole.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            must_be_new(self.destination)
            whole.rename(self.destination)
            shutil.rmtree(self.folder, ignore_errors=True)


def write_folder(
    destination: Path, tensors: Iterable[tuple[str, Tensor]], files: Mapping[str, str], copies: Iterable[Path]
) -> None:
    """Write a checkpoint folder, whole or not at all; tensors are taken one by one.

    Raises:
        UsageError: the destination exists, or the disk refuses.
    """
    draft = Draft(destination, {}, resume=False)
    try:
        parts: list[str] = []
        held: dict[str, Tensor] = {}
        for name, tensor in tensors:
            if held and sum(one.nbytes for one in held.values()) + tensor.nbytes > PART_BYTES:
                parts.append(f"{len(parts):05}")
                draft.write(parts[-1], held, {})
                held = {}
            held[name] = tensor
        parts.append(f"{len(parts):05}")
        draft.write(parts[-1], held, {})
        draft.finish(parts, files, copies)
    finally:
        shutil.rmtree(draft.folder, ignore_errors=True)


def must_be_new(destination: Path) -> None:
    """Refuse a destination that is there already (UsageError), before any work."""
    if os.path.lexists(destination):
        raise UsageError(
            f"{destination} exists and is left as it is\n  fix: name a new folder, or remove that one first"
        )


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn what a disk refuses into a message."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = (
            "free some space, then repeat the command; quantize goes on with --resume"
            if full
            else "choose a writable place"
        )
        raise UsageError(f"cannot write {error.filename or path}: {error.strerror or error}\n  fix: {fix}") from error
    except Exception as error:  # safetensors has an exception of its own for a full disk
        if type(error).__name__ != "SafetensorError":
            raise
        raise UsageError(
            f"cannot write {path}: {error}\n  fix: free some space, then repeat the command with --resume"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def save_whole(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, whole or not at all.

    Raises:
        UsageError: the disk refuses.
    """
    part = path.with_name(path.name + ".part")
    with disk(path):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata={"format": "pt"})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(path)


def join(parts: list[Path], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Join safetensors files to ``model.safetensors``, or to numbered shards with an index, without reading tensors."""
    shards: list[list[Path]] = [[]]
    room = shard_bytes
    for part in parts:
        size = part.stat().st_size
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(part)
        room -= size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    where: dict[str, str] = {}
    total = 0
    for name, group in zip(names, shards, strict=True):
        tensors = _join(group, folder / name)
        where |= dict.fromkeys(tensors, name)
        total += sum(tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _join(parts: list[Path], path: Path) -> dict[str, int]:
    """Join files to one; returns the bytes of each tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    sizes: dict[str, int] = {}
    starts: list[int] = []
    offset = 0
    for part in parts:
        with part.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries: dict[str, Any] = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            header[name] = {**entry, "data_offsets": [begin + offset, end + offset]}
            sizes[name] = end - begin
        starts.append(8 + length)
        offset += part.stat().st_size - 8 - length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for part, start in zip(parts, starts, strict=True):
            with part.open("rb") as file:
                file.seek(start)
                shutil.copyfileobj(file, out, _COPY)
    return sizes
