"""What the names that a person gives stand for: files, folders, hub ids."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from quantserve.config.source import SUFFIXES
from quantserve.errors import ConfigError

HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
LORA: Final = "a LoRA adapter (adapter_config.json), not a model\n  fix: merge it into its base model, and name that"
MAX_FILES: Final = 1000
MAX_FOLDERS: Final = 2000


def expand(text: str) -> Path:
    """`text` as a path, with ``~`` for the home directory where there is one."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def config_files(folder: Path) -> list[Path]:
    """Config files under `folder`, without hidden folders and checkpoints."""
    files: list[Path] = []
    for count, (here, folders, names) in enumerate(os.walk(folder)):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not (Path(here, name) / "config.json").is_file()
        )
        files += [Path(here, name) for name in sorted(names) if name.lower().endswith(SUFFIXES) and name[0] != "."]
        if len(files) > MAX_FILES or count > MAX_FOLDERS:
            found = f"{len(files)} config files in more than {count} folders"
            raise ConfigError(f"{folder}: {found}, which cannot be one server\n  fix: name a smaller folder")
    return files


def resolved(text: str, folder: Path | None) -> str:
    """`text` as an absolute path if it is one; hub ids stay as they are."""
    path = expand(text)
    if "\0" in text or "://" in text:
        return text
    if path.is_absolute():
        return str(path)
    for start in dict.fromkeys([folder or Path(), Path()]):
        if (start / path).exists():
            return str((start / path).resolve())
    return str(((folder or Path()) / path).resolve()) if text.startswith(("./", "../")) else text


def resolved_file(text: str, folder: Path | None) -> str:
    """`text`, which names a file and no hub id, as an absolute path."""
    return resolved(text if expand(text).is_absolute() else "./" + text, folder)


def is_hub_id(text: str, folders: Sequence[Path]) -> bool:
    """Whether a name that is no path looks like ``org/name``; a folder called ``org`` makes it a mistyped path."""
    return (
        bool(HUB_ID.fullmatch(text))
        and not text.lower().endswith((*SUFFIXES, ".safetensors", ".bin", ".pt", ".txt"))
        and ".." not in text
        and not any((folder / text.split("/", 1)[0]).is_dir() for folder in folders)
    )


def folder_id(path: Path) -> str:
    """An id for a checkpoint folder: its name, or ``org/name`` for a snapshot in the Hugging Face cache."""
    path = path.resolve()
    cached = path.parent.parent.name
    if path.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/")
    return re.sub(r"[^\w.+-]+", "-", path.name, flags=re.ASCII).strip("-._") or "model"


def not_found(text: str, folders: Sequence[Path]) -> str:
    """Say that nothing has this name, and which names are close."""
    shown = (text if text.isprintable() else repr(text))[:200]
    for folder in folders:
        path = folder / expand(text)
        try:
            if path.is_dir():
                adapter = (path / "adapter_config.json").is_file()
                return f"{shown}: {LORA if adapter else 'a folder without config.json, so it holds no model'}"
            if path.is_symlink():
                return f"{shown}: a symbolic link that leads nowhere, to {os.readlink(path)!r:.200}"
            names = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        except (OSError, ValueError):
            continue
        close = [name for name in names if name.partition(".")[0] == path.name]
        if close := close or get_close_matches(path.name, names, n=3, cutoff=0.6):
            return f"{shown}: no such file or folder; did you mean {' or '.join(str(path.parent / n) for n in close)}?"
    if HUB_ID.fullmatch(text):
        return (
            f"{shown}: no such file or folder, and no hub id because a folder {text.split('/', 1)[0]} is here\n"
            "  fix: for a hub id, write a model file with engine_config.model_id"
        )
    return f"{shown}: no such file or folder, and not a hub id (org/name) either"
