"""The folders that caches, settings, temporary files and sockets go to, and where they go when one cannot be used.

A container may have no HOME, a user id without an entry in /etc/passwd, or folders that are read-only. Libraries then
write beside the working directory (``./~/.cache``) or raise deep inside an import. `look` finds such folders from the
environment alone, `settle` points every library to folders that can be used; nothing else may ask for a home.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import stat
import tempfile
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quantserve.errors import CheckpointError, EngineError

SOCKET_BYTES: Final = 107
"""Longest path of a Unix socket on Linux."""
RAY_SOCKET_BYTES: Final = len("/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
"""What Ray's longest socket adds to its temporary folder."""
VLLM_SOCKET_BYTES: Final = len("/01234567-89ab-cdef-0123-456789abcdef")
"""What vLLM's sockets add to the temporary folder."""

_FOLDERS: Final = (
    ("XDG_CACHE_HOME", "{HOME}/.cache"),
    ("XDG_CONFIG_HOME", "{HOME}/.config"),
    ("HF_HUB_CACHE", "{HF_HOME}/hub"),
    ("HF_MODULES_CACHE", "{HF_HOME}/modules"),
    ("HF_XET_CACHE", "{HF_HOME}/xet"),
    ("HF_ASSETS_CACHE", "{HF_HOME}/assets"),
    ("VLLM_CACHE_ROOT", "{XDG_CACHE_HOME}/vllm"),
    ("VLLM_CONFIG_ROOT", "{XDG_CONFIG_HOME}/vllm"),
    ("TORCH_HOME", "{XDG_CACHE_HOME}/torch"),
    ("TORCHINDUCTOR_CACHE_DIR", "{TMPDIR}/torchinductor_{USER}"),
    ("TRITON_HOME", "{HOME}"),
    ("TRITON_CACHE_DIR", "{TRITON_HOME}/.triton/cache"),
    ("FLASHINFER_WORKSPACE_BASE", "{HOME}"),
    ("NUMBA_CACHE_DIR", "{XDG_CACHE_HOME}/numba"),
    ("MPLCONFIGDIR", "{XDG_CONFIG_HOME}/matplotlib"),
)
"""Variables of the libraries below us, and where each library goes without its variable."""
_TEMPORARY: Final = ("/tmp", "/var/tmp", "/dev/shm")


@dataclass(frozen=True, slots=True)
class Homes:
    """Where everything goes.

    Attributes:
        folders: variable -> folder, of every variable that names one.
        changes: the variables that have to be set for that.
        notes: for a person: each folder that is not used, why, and what is used instead.
        spare: folder of our own that stands in for those, "" when nothing can be written at all.
    """

    folders: Mapping[str, str]
    changes: Mapping[str, str]
    notes: tuple[str, ...]
    spare: str

    @property
    def cache(self) -> Path:
        """quantserve's own folder in the user's cache."""
        return Path(self.folders["XDG_CACHE_HOME"], "quantserve")


def look(environ: Mapping[str, str]) -> Homes:
    """Find the folders that an environment names, and what to use where one cannot be used. Nothing is written."""
    return _Search(environ).homes()


def settle(environ: MutableMapping[str, str]) -> tuple[str, ...]:
    """Make an environment name only folders that can be used, for this process and those it starts.

    Returns:
        What was changed, for a person.

    Raises:
        EngineError: no folder for temporary files can be written.
    """
    homes = look(environ)
    if not homes.spare:
        raise EngineError(
            f"no folder for temporary files can be written: {'; '.join(homes.notes)}\n"
            "  fix: mount one, such as /tmp, or name one in TMPDIR"
        )
    if homes.notes:
        Path(homes.spare).mkdir(mode=0o700, parents=True, exist_ok=True)
    environ.update(homes.changes)
    return homes.notes


def expand(text: str) -> Path:
    """`text` as a path, with ``~`` for the home directory where there is one."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def parted(source: str) -> tuple[str, str]:
    """``folder:Q4_K_M`` as folder and choice; the choice is "" for an existing path and where there is none."""
    place, _, choice = source.rpartition(":")
    if not place or not choice or "/" in choice or "\0" in source or os.path.lexists(expand(source)):
        return source, ""
    return place, choice


def snapshot_in(folder: Path) -> Path:
    """The model in a folder: the only snapshot of ``models--org--name`` in a Hugging Face cache, else the folder.

    Raises:
        CheckpointError: the cache has no snapshot of the model, or several.
    """
    repository = folder.parent if folder.name == "snapshots" else folder
    if not repository.name.startswith("models--"):
        return folder
    name = repository.name.removeprefix("models--").replace("--", "/")
    found = sorted(entry for entry in (repository / "snapshots").glob("*") if entry.is_dir())
    if len(found) == 1:
        return found[0]
    if not found:
        raise CheckpointError(f"{folder}: no snapshot of {name} is in it\n  fix: `hf download {name}`")
    main = repository / "refs" / "main"
    current = main.read_text(errors="replace").strip() if main.is_file() else ""
    shown = ", ".join(f"{one.name} (main)" if one.name == current else one.name for one in found[:8])
    best = next((one for one in found if one.name == current), found[0])
    raise CheckpointError(
        f"{folder}: {len(found)} snapshots of {name} are in it: {shown}\n  fix: name one, such as {best}, or {name}"
    )


def is_bucket(source: str) -> bool:
    """Whether a model is named by its place in an object store, ``s3://bucket/folder`` or ``gs://bucket/folder``."""
    return source.startswith(("s3://", "gs://"))


def url_mistake(source: str) -> str:
    """What is wrong with a URL where a model is expected, and the fix; "" when `source` is none."""
    if is_bucket(source) or not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
        return ""
    hub = re.match(r"https?://(?:huggingface|hf)\.co/([\w.-]+/[\w.-]+)", source)
    other = re.match(r"(?:s3a|s3n|gcs)://(.*)", source)
    if hub:
        fix = f"name it {hub[1]}"
    elif other:
        fix = f"write {'gs' if source.startswith('gcs') else 's3'}://{other[1]}"
    else:
        fix = "download the model, and name its folder"
    return f"a URL, where a folder, a model of the Hub (org/name) or a bucket (s3://, gs://) is expected\n  fix: {fix}"


def temporary_folder() -> str:
    """The folder for temporary files.

    Raises:
        EngineError: none can be written.
    """
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        raise EngineError(
            "no folder for temporary files can be written\n  fix: mount one, such as /tmp, or name one in TMPDIR"
        ) from None


class _Search:
    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._folders: dict[str, str] = {}
        self._changes: dict[str, str] = {}
        self._notes: list[str] = []
        self._spare = ""

    def homes(self) -> Homes:
        self._user()
        self._temporary()
        self._home()
        for name, usual in _FOLDERS:
            self._folder(name, usual.format_map(self._folders))
            if name == "XDG_CACHE_HOME":
                self._hugging_face()
        folders = {name: folder for name, folder in self._folders.items() if name != "USER"}
        return Homes(folders, self._changes, tuple(self._notes), self._spare)

    def _user(self) -> None:
        """torch asks for the user's name and raises where there is none."""
        name = next(filter(None, (self._environ.get(key) for key in ("LOGNAME", "USER", "LNAME", "USERNAME"))), "")
        if not name and not (name := _passwd().pw_name):
            name = self._changes["USER"] = f"uid{os.getuid()}"
        self._folders["USER"] = name

    def _temporary(self) -> None:
        given = self._environ.get("TMPDIR") or _TEMPORARY[0]
        usable = [folder for folder in (given, *_TEMPORARY) if not _temporary_fault(folder)]
        self._folders["TMPDIR"] = given
        if not usable:
            self._notes.append(f"TMPDIR {given} {_temporary_fault(given)}, nor can {', '.join(_TEMPORARY)} be used")
        elif usable[0] != given:
            self._change("TMPDIR", given, _temporary_fault(given), usable[0])
        elif given != self._environ.get("TMPDIR", given):
            self._changes["TMPDIR"] = given
        self._spare = _own(usable[0]) if usable else ""
        # Ray takes RAY_TMPDIR, TMPDIR or /tmp as it is, and makes longer sockets than vLLM.
        ray = self._environ.get("RAY_TMPDIR") or self._folders["TMPDIR"]
        self._folders["RAY_TMPDIR"] = ray
        short = [folder for folder in (ray, *_TEMPORARY) if not ray_fault(folder)]
        if usable and short and short[0] != ray:
            self._change("RAY_TMPDIR", ray, ray_fault(ray), short[0])

    def _home(self) -> None:
        given = self._environ.get("HOME", "")
        home, fault = given or _passwd().pw_dir, ""
        if not home:
            fault = f"is not set, and user {os.getuid()} has no entry in /etc/passwd"
        elif not os.path.isabs(home):
            fault = "is no absolute path"
        else:
            fault = _fault(home)
        self._given_home = self._folders["HOME"] = home
        if fault and self._spare:
            self._change("HOME", home, fault, self._spare)
        elif not given:
            self._changes["HOME"] = home

    def _hugging_face(self) -> None:
        """HF_HOME. Models and a token may be in a home that cannot be written: that is kept, its parts are judged."""
        cache = self._environ.get("XDG_CACHE_HOME") or f"{self._given_home}/.cache"
        given = self._environ.get("HF_HOME") or f"{cache}/huggingface"
        folder = str(expand(given).absolute())
        if os.path.isabs(cache) and os.access(folder, os.R_OK | os.X_OK) and os.path.isdir(folder):
            self._folders["HF_HOME"] = folder
            if folder != self._environ.get("HF_HOME", f"{self._folders['XDG_CACHE_HOME']}/huggingface"):
                self._changes["HF_HOME"] = folder
        else:
            self._folder("HF_HOME", f"{self._folders['XDG_CACHE_HOME']}/huggingface")

    def _folder(self, name: str, usual: str) -> None:
        given = self._environ.get(name, "")
        if name.startswith("XDG_") and given and not expand(given).is_absolute():
            self._change(name, given, "is no absolute path", usual)
        folder = str(expand(given).absolute()) if given and name not in self._changes else usual
        self._folders[name] = folder
        if folder != given and name in self._environ:
            self._changes[name] = folder
        fault = _fault(folder)
        if not fault or not self._spare:
            return
        if name == "HF_HUB_CACHE" and _holds_models(folder):
            self._notes.append(f"{name} {folder} {fault}: the models in it are used, none can be added")
            return
        # The rest of Hugging Face's folder goes elsewhere without a word of its own.
        quiet = not given and name.startswith("HF_") and name not in ("HF_HOME", "HF_HUB_CACHE")
        self._change(name, folder, fault, f"{self._spare}/{name.lower()}", "" if quiet else None)

    def _change(self, name: str, folder: str, fault: str, instead: str, note: str | None = None) -> None:
        self._folders[name] = self._changes[name] = instead
        if note is None:
            note = f"{name} {folder} {fault}: {instead} is used" if folder else f"{name} {fault}: {instead} is used"
        if note:
            self._notes.append(note)


def _passwd() -> pwd.struct_passwd:
    """The user's entry in /etc/passwd; empty texts where there is none."""
    try:
        return pwd.getpwuid(os.getuid())
    except KeyError:
        return pwd.struct_passwd(("", "", os.getuid(), os.getgid(), "", "", ""))


def _fault(folder: str) -> str:
    """Why files cannot be put into a folder, which need not exist yet; "" when they can."""
    path = Path(folder)
    for there in (path, *path.parents):
        try:
            status, system = os.stat(there), os.statvfs(there)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            return f"cannot be used ({getattr(error, 'strerror', None) or error})"
        if not stat.S_ISDIR(status.st_mode):
            return "is no folder" if there == path else f"cannot be made ({there} is no folder)"
        # /proc and /sys let root "write" and hold no files; they have no blocks.
        if os.access(there, os.W_OK | os.X_OK) and system.f_blocks:
            return ""
        return "cannot be written" if there == path else f"cannot be made ({there} cannot be written)"
    return "cannot be made"


def _temporary_fault(folder: str) -> str:
    """The same of a folder for temporary files, which must exist, in which vLLM makes sockets."""
    if not os.path.isabs(folder):
        return "is no absolute path"
    if not os.path.lexists(folder):
        return "does not exist"
    return _fault(folder) or _too_long(folder, VLLM_SOCKET_BYTES)


def ray_fault(folder: str) -> str:
    """Why Ray cannot put its session and sockets into a folder; "" when it can."""
    if not os.path.isabs(folder):
        return "is no absolute path"
    return _too_long(folder, RAY_SOCKET_BYTES) or _fault(os.path.join(folder, "ray"))


def _too_long(folder: str, socket_bytes: int) -> str:
    size, room = len(os.fsencode(folder)), SOCKET_BYTES - socket_bytes
    return f"is {size} bytes long, {room} at most for the sockets in it" if size > room else ""


def _own(temporary: str) -> str:
    """A folder in `temporary` for this user; one that somebody else has made there in advance is not trusted."""
    folder = os.path.join(temporary, f"quantserve-{os.getuid()}")
    try:
        status = os.lstat(folder)
    except FileNotFoundError:
        return folder
    except OSError:
        return f"{folder}-{os.getpid()}"
    safe = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return folder if safe else f"{folder}-{os.getpid()}"


def _holds_models(folder: str) -> bool:
    """Whether a cache of Hugging Face has models in it that can be read."""
    try:
        return any(entry.name.startswith("models--") for entry in os.scandir(folder))
    except OSError:
        return False


def free_bytes(folder: Path) -> int:
    """Free bytes of the file system that a folder is on, or will be on."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
