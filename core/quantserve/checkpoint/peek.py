"""The first bytes of tensors in local files, for what headers do not tell."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantserve.checkpoint.data import Checkpoint


def first_bytes(checkpoint: Checkpoint, names: Iterable[str], count: int) -> dict[str, bytes]:
    """The first bytes of tensors in safetensors files of a local folder.

    Args:
        checkpoint: the model.
        names: of the tensors.
        count: bytes of each; of a shorter tensor all.

    Returns:
        By name. What is not there, is on the hub, or cannot be read is left out.
    """
    folder = checkpoint.path
    if folder is None:
        return {}
    by_file: dict[str, list[str]] = {}
    for name in names:
        tensor = checkpoint.tensors.get(name)
        if tensor is not None and tensor.file.endswith(".safetensors"):
            by_file.setdefault(tensor.file, []).append(name)
    found: dict[str, bytes] = {}
    for file, inside in by_file.items():
        try:
            with (folder / file).open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
                for name in inside:
                    first, last = header[name]["data_offsets"]
                    stream.seek(8 + length + first)
                    found[name] = stream.read(min(count, last - first))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found
