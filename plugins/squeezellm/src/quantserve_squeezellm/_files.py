"""Checkpoint folders: read safetensors tensor by tensor, write a new folder whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantserve.errors import CheckpointError, UsageError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are done, and how many there are."""

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Files that belong to the model whatever its weights look like.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError when it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, two spaces per level, with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: Path, destination: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence; a file already there stays."""
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not (destination / file.name).exists():
                shutil.copyfile(file, destination / file.name)


def must_be_new(destination: Path) -> None:
    """Refuse a destination that is there already (UsageError), before any work goes into it."""
    if destination.exists() or destination.is_symlink():
        raise UsageError(
            f"{destination} exists and is left as it is\n  fix: name a new folder, or remove that one first"
        )


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A temporary folder beside `destination` that becomes it on success and vanishes on any failure.

    Raises:
        UsageError: the destination exists, or cannot be created.
    """
    must_be_new(destination)
    partial = destination.parent / f".{destination.name}.partial-{os.getpid()}"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UsageError(f"cannot create {partial}: {error.strerror}\n  fix: choose a writable place") from error
    try:
        yield partial
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def natural(name: str) -> list[str | int]:
    """A sort key under which layer 2 comes before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


class SafetensorsFolder:
    """The tensors of a local safetensors checkpoint, read one at a time.

    Raises:
        CheckpointError: no safetensors, a shard missing, an index that leaves the folder, or a broken header.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, Any] = {}
        self.where: dict[str, Path] = {}
        for path in self._paths():
            if not path.is_file():
                raise CheckpointError(
                    f"{folder}: {path.name} is listed in {INDEX} but missing\n  fix: download it again"
                )
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path}: not a whole safetensors file: {error}\n  fix: download it again"
                ) from error
            self._files[path] = handle
            names: list[str] = list(handle.keys())  # type: ignore[no-untyped-call]
            self.where.update(dict.fromkeys(names, path))

    def _paths(self) -> list[Path]:
        if not (self.folder / INDEX).is_file():
            paths = sorted(self.folder.glob("*.safetensors"))
            if not paths:
                raise CheckpointError(
                    f"{self.folder}: no *.safetensors files here\n  fix: give a folder with a checkpoint"
                )
            return paths
        names = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise CheckpointError(f"{self.folder / INDEX}: no usable weight_map")
        files = sorted(set(names.values()))
        for name in files:
            if Path(name).name != name:
                raise CheckpointError(f"{self.folder / INDEX}: shard name {name!r} leaves the folder; not followed")
        return [self.folder / name for name in files]

    def names(self) -> list[str]:
        """Tensor names, in a natural order: layer 2 before layer 10."""
        return sorted(self.where, key=natural)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the header, nothing read."""
        return tuple(self._files[self.where[name]].get_slice(name).get_shape())

    def get(self, name: str) -> Tensor:
        """Read one tensor."""
        tensor: Tensor = self._files[self.where[name]].get_tensor(name)
        return tensor


class ShardWriter:
    """Write tensors one by one into safetensors shards with an index, with at most one tensor in memory.

    The header of a shard comes first in the file but is known last, so the bytes wait in a file of their own.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.shards: list[Path] = []
        self.weight_map: dict[str, int] = {}
        self.total = 0
        self._data = folder / "weights.part"
        self._stream = self._data.open("wb")
        self._header: dict[str, Any] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor; ValueError when the name came before."""
        if name in self.weight_map:
            raise ValueError(f"tensor {name} written twice")
        flat = tensor.detach().to("cpu").contiguous().view(-1)
        size = flat.numel() * flat.element_size()
        start = self._stream.tell()
        if start and start + size > self.shard_bytes:
            self._finish_shard()
            start = 0
        self._stream.write(flat.view(torch.uint8).numpy().data)
        self._header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + size],
        }
        self.weight_map[name] = len(self.shards)
        self.total += size

    def close(self) -> None:
        """Write what is left, give the shards their names, write the index when there are several."""
        self._finish_shard()
        self._stream.close()
        self._data.unlink()
        count = len(self.shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        for path, name in zip(self.shards, names, strict=True):
            path.rename(self.folder / name)
        if count > 1:
            weight_map = {name: names[shard] for name, shard in self.weight_map.items()}
            write_json(self.folder / INDEX, {"metadata": {"total_size": self.total}, "weight_map": weight_map})

    def _finish_shard(self) -> None:
        self._stream.close()
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._header}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        path = self.folder / f"shard-{len(self.shards)}"
        with path.open("wb") as out, self._data.open("rb") as data:
            out.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(data, out, 16 * 2**20)
        self.shards.append(path)
        self._header = {}
        self._stream = self._data.open("wb")
