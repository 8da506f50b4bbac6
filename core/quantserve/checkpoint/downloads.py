"""Files that must be on this machine before an engine starts: those of buckets, and adapters of the hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantserve.checkpoint.adapter import Adapter
from quantserve.checkpoint.data import Checkpoint
from quantserve.checkpoint.text import shown
from quantserve.errors import CheckpointError, one_line
from quantserve.system.homes import is_bucket, look

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")


def folder_of(opened: Checkpoint | Adapter) -> Path | None:
    """The folder that holds the files, or will after `fetch`; None for a model that vLLM fetches from the hub."""
    if opened.path is not None:
        return opened.path.absolute()
    source, revision = _plain(opened), str(opened.revision)
    if is_bucket(source):
        from quantserve.checkpoint.bucket import cache_folder

        return cache_folder(source, revision)
    if isinstance(opened, Checkpoint):
        return None
    repository = "models--" + source.replace("/", "--")
    return Path(look(os.environ).folders["HF_HUB_CACHE"], repository, "snapshots", revision)


def wanted(opened: Checkpoint | Adapter) -> dict[str, Any] | None:
    """What `fetch` needs as plain data; None where nothing is to be fetched.

    Returns:
        ``source``, ``revision``, ``folder`` and ``files`` (name -> bytes).
    """
    folder = folder_of(opened)
    if folder is None or opened.location == "local" or not (isinstance(opened, Adapter) or is_bucket(opened.source)):
        return None
    files = opened.files if isinstance(opened, Adapter) else _needed(opened)
    return {"source": _plain(opened), "revision": opened.revision, "folder": str(folder), "files": dict(files)}


def fetch(download: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Bring the files to this machine, unless they are there.

    Args:
        download: as from `wanted`.
        say: gets lines for a person.

    Raises:
        CheckpointError: they cannot be had.
    """
    source, revision, files = download["source"], download["revision"], download["files"]
    folder = Path(download["folder"])
    if all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items()):
        return
    if is_bucket(source):
        from quantserve.checkpoint.bucket import download as from_bucket

        got = from_bucket(source, revision, files, say)
    else:
        from huggingface_hub import snapshot_download

        say(f"Downloading the adapter {shown(source)} to {folder}")
        try:
            got = Path(snapshot_download(source, revision=revision, allow_patterns=list(files)))
        except Exception as error:
            fix = f"try `hf download {source}`"
            message = f"cannot download the adapter {shown(source)}: {one_line(error)}"
            raise CheckpointError(f"{message}\n  fix: {fix}") from None
    if got != folder:
        raise CheckpointError(
            f"the plan has {shown(source)} in {folder}, and this machine keeps such files in {got}\n"
            "  fix: set XDG_CACHE_HOME and HF_HUB_CACHE to the same folders on every node"
        )


def _plain(opened: Checkpoint | Adapter) -> str:
    """The source without the choice of a file, and without a revision."""
    source = opened.source
    if is_bucket(source):
        head, _, last = source.rpartition("/")
        if isinstance(opened, Checkpoint) and opened.container and last.partition(":")[0] in opened.container:
            return head
        return f"{head}/{last.partition(':')[0]}"
    return source.partition("@")[0]


def _needed(checkpoint: Checkpoint) -> dict[str, int]:
    """The weight files that were read, and everything that holds no weights."""
    read = {*checkpoint.container, *(tensor.file for tensor in checkpoint.tensors.values())}
    return {name: size for name, size in checkpoint.files.items() if name in read or not name.endswith(_WEIGHTS)}
