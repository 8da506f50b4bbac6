"""Files that are made once and kept: compiled CUDA kernels. A cache that cannot be read or written is no cache."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path

NAME = "quantserve-kernels"
DIGEST = hashlib.sha256().digest_size


def read(name: str) -> bytes | None:
    """What `write` kept under this name; None where there is nothing, or it is not whole."""
    folder = cache_folder()
    try:
        content = b"" if folder is None else (folder / name).read_bytes()
    except OSError:
        return None
    data = content[DIGEST:]
    return data if data and hashlib.sha256(data).digest() == content[:DIGEST] else None


def write(name: str, data: bytes) -> None:
    """Keep data under a file name, whole or not at all."""
    folder = cache_folder()
    if folder is None:
        return
    draft = folder / f"{name}.{os.getpid()}"
    try:
        draft.write_bytes(hashlib.sha256(data).digest() + data)
        draft.replace(folder / name)
    except OSError:  # a full disk
        try:
            draft.unlink(missing_ok=True)
        except OSError:
            return


def cache_folder() -> Path | None:
    """The first of these that can be made and written; None where there is none.

    QUANTSERVE_KERNELS_CACHE, XDG_CACHE_HOME/quantserve-kernels, ~/.cache/quantserve-kernels, and a folder of this user
    alone among the temporary files.
    """
    for place in (_asked, _xdg, _home, _temporary):
        try:
            folder = place()
            if folder is None:
                continue
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.access(folder, os.W_OK) and (place is not _temporary or _mine(folder)):
                return folder
        except (OSError, RuntimeError, ValueError):  # no such file system, no home directory, no valid path
            continue
    return None


def _asked() -> Path | None:
    asked = os.environ.get("QUANTSERVE_KERNELS_CACHE")
    return Path(asked).expanduser() if asked else None


def _xdg() -> Path | None:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base, NAME) if os.path.isabs(base) else None  # the specification ignores relative ones


def _home() -> Path | None:
    return Path.home() / ".cache" / NAME


def _temporary() -> Path | None:
    return Path(tempfile.gettempdir(), f"{NAME}-{os.getuid()}")


def _mine(folder: Path) -> bool:
    """Whether no other user can have put a file there: it would run on the GPU."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
