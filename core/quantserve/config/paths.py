"""Resolves names given by the user to files, folders and hub ids."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from quantserve.config.report import fault
from quantserve.config.source import SUFFIXES
from quantserve.errors import ConfigError
from quantserve.system.homes import expand, parted, url_mistake

HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
LORA: Final = (
    "a LoRA adapter (adapter_config.json), not a model\n  fix: list it in engine_config.adapters of its base model"
)
EMPTY: Final = "a folder without config.json, and without config files (.yaml, .yml, .json)"
WANTED: Final = (
    "name a config file (.yaml, .yml, .json), a model folder (config.json and weights), a hub id (org/name) or a "
    "bucket (s3://, gs://)"
)
"""What to do about a source that is none of these."""
MAX_FILES: Final = 1000
MAX_FOLDERS: Final = 2000


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a model: a config.json, Mistral's params.json, or weights without any config file."""
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    if "config.json" in names or ("params.json" in names and any(name.startswith("consolidated") for name in names)):
        return True
    if any(name.lower().endswith(SUFFIXES) and name not in ("params.json",) for name in names):
        return False
    if any(name.endswith((".safetensors", ".gguf")) for name in names):
        return True
    paths = [folder / name for name in names]
    return not any(path.is_dir() for path in paths) and any(is_container(path) for path in paths)


def is_container(path: Path) -> bool:
    """Whether a file may hold a model that a plugin can read: no config, no weights of a folder, and no text."""
    if path.suffix.lower() in (*SUFFIXES, ".safetensors", ".bin", ".pt", "") or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return b"\0" in file.read(1024)
    except OSError:
        return False


def config_files(folder: Path) -> list[Path]:
    """Config files under `folder`, not searching hidden folders and checkpoints.

    Raises:
        ConfigError: there are too many files or folders.
    """
    files: list[Path] = []
    for count, (here, folders, names) in enumerate(os.walk(folder)):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not is_checkpoint(Path(here, name))
        )
        files += [Path(here, name) for name in sorted(names) if name.lower().endswith(SUFFIXES) and name[0] != "."]
        if len(files) > MAX_FILES or count > MAX_FOLDERS:
            limits = f"the limits are {MAX_FILES} config files and {MAX_FOLDERS} folders"
            raise ConfigError(f"{folder}: too large to search: {limits}\n  fix: give a smaller folder, or the files")
    return files


def resolved(text: str, folder: Path | None) -> str:
    """`text` as an absolute path if it is a path; hub ids are returned unchanged."""
    path = expand(text)
    if "\0" in text or "://" in text:
        return text
    if path.is_absolute():
        return str(path)
    for start in dict.fromkeys([folder or Path(), Path()]):
        if os.path.exists(start / path):  # False for a path the file system refuses
            return str((start / path).resolve())
    place, choice = parted(text)
    if choice and (found := resolved(place, folder)) != place:
        return f"{found}:{choice}"
    return str(((folder or Path()) / path).resolve()) if text.startswith(("./", "../")) else text


def resolved_file(text: str, folder: Path | None) -> str:
    """`text`, which is always a file and never a hub id, as an absolute path."""
    return resolved(text if expand(text).is_absolute() else "./" + text, folder)


def is_hub_id(text: str, folders: Sequence[Path]) -> bool:
    """Whether a name that is not an existing path is a hub id ``org/name``; not if a folder ``org`` exists."""
    text = parted(text)[0]
    return (
        bool(HUB_ID.fullmatch(text))
        and not text.lower().endswith((*SUFFIXES, ".safetensors", ".bin", ".pt", ".txt"))
        and ".." not in text
        and not any((folder / text.split("/", 1)[0]).is_dir() for folder in folders)
    )


def folder_id(path: Path) -> str:
    """The model id of a checkpoint folder: its name, or ``org/name`` for a snapshot in the Hugging Face cache."""
    path = path.resolve()
    cached = path.parent.parent.name
    if path.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/")
    name = unicodedata.normalize("NFKC", path.name)
    kept = "".join(char if fits_id(char) and char not in ":@" else " " for char in name)
    return "-".join(kept.split()).strip("-._") or "-".join(["model", *(f"{ord(char):x}" for char in name[:30])])


def is_model_id(text: str) -> bool:
    """Whether a text can be the id of a model: parts joined by ``/`` that begin with a letter or digit."""
    return all(part[:1].isalnum() and all(map(fits_id, part)) for part in text.split("/"))


def usable_id(text: str) -> str:
    """A name as the id of a model or adapter in the API, in normal form; the fault of a validator where it cannot be.

    Raises:
        PydanticCustomError: it is too long, or has characters that an id cannot have.
    """
    text = unicodedata.normalize("NFC", text)  # as keyboards and clients write it
    if len(text.encode()) > 200:
        raise fault(f"an id of {len(text.encode())} bytes; at most 200 fit into a URL", fix="give a shorter one")
    if not is_model_id(text):
        raise fault(
            f"{text[:60]!r} cannot be an id in the API: use letters, digits and . _ - : @ + in parts joined by /",
            fix="give the folder in hf_model_id and a plain name here" if re.match(r"[./~\\]", text) else "",
        )
    return text


def fits_id(char: str) -> bool:
    """Whether an id may hold a character: letters and digits of every script with their marks, and ``. _ - : @ +``."""
    return char.isalnum() or char in "._-:@+" or unicodedata.category(char) in ("Mn", "Mc")


def not_found(text: str, folders: Sequence[Path]) -> str:
    """The error message for a name that does not exist, with close matches."""
    shown = (text if text.isprintable() else repr(text))[:200]
    if mistake := url_mistake(text):
        return f"{shown}: {mistake}"
    for folder in folders:
        path = folder / expand(text)
        try:
            if path.is_dir():
                adapter = (path / "adapter_config.json").is_file()
                return f"{shown}: {LORA if adapter else EMPTY}"
            if path.is_symlink():
                return f"{shown}: a broken symbolic link to {os.readlink(path)!r:.200}"
            names = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
        except (OSError, ValueError):
            continue
        close = [name for name in names if name.partition(".")[0] == path.name]
        if close := close or get_close_matches(path.name, names, n=3, cutoff=0.6):
            meant = " or ".join(str(path.parent / name) for name in close)
            return f"{shown}: no such file or folder; did you mean {meant}?\n  fix: correct the path"
    if HUB_ID.fullmatch(text):
        return (
            f"{shown}: no such file or folder, and not read as a hub id: a folder {text.split('/', 1)[0]} exists here\n"
            "  fix: correct the path; for a hub id write a model file with engine_config.model_id"
        )
    return f"{shown}: no such file or folder, and not a hub id (org/name)\n  fix: correct the path or the id; {WANTED}"
