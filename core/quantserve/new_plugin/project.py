"""The files of a new distribution.

A template's name ends in ``.tmpl``, so that no tool takes it for a module of quantserve. ``{{name}}`` stands for a
field of `Project.fields`; lines between ``#if codebook custom`` and ``#end`` are for these kinds only. In paths
``package`` is the package, and ``dot-`` a leading dot.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from typing import Final

from packaging.version import Version

from quantserve import __version__
from quantserve.errors import UsageError
from quantserve.hookspecs import API_VERSION


@dataclass(frozen=True)
class Kind:
    """A kind of plugin.

    Attributes:
        about: for the option's help.
        templates: folders of templates, of which each gives other files.
        summary: the default of the distribution's description.
    """

    about: str
    templates: tuple[str, ...]
    summary: str


KINDS: Final[Mapping[str, Kind]] = {
    "vllm-method": Kind(
        "A method that vLLM has: checks of its checkpoints.", ("common", "vllm-method"), "{vllm_name} as vLLM serves it"
    ),
    "codebook": Kind(
        "A weight-only format for quantserve's kernels.",
        ("common", "engine", "codebook"),
        "{bits}-bit weights with a scale for {group_size} inputs",
    ),
    "custom": Kind(
        "A method with a linear layer of its own.",
        ("common", "engine", "custom"),
        "8-bit weights with a scale for each output",
    ),
    "policy": Kind(
        "No method: engine arguments, variables, findings.", ("common", "policy"), "Rules for the models of this house"
    ),
    "command": Kind("A subcommand of quantserve.", ("common", "command"), "The bytes of a checkpoint by dtype"),
}
WIDTHS: Final = (2, 3, 4, 8)
GROUP_SIZES: Final = (16, 32, 64, 128, 256)

_FIELD = re.compile(r"\{\{(\w+)\}\}")
_PART = re.compile(r"^#if ([\w -]+)\n(.*?)^#end\n", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Project:
    """What the templates are filled with.

    Attributes:
        name: of the entry point and the method; the distribution is ``quantserve-NAME``.
        kind: one of `KINDS`.
        summary: one line; the kind's own when it is empty.
        author: ``Name`` or ``Name <mail>``, or "".
        license: an SPDX expression.
        bits, group_size: of a codebook format or of vLLM's.
        vllm_name: vLLM's name of its method.
    """

    name: str
    kind: str
    summary: str = ""
    author: str = ""
    license: str = "Apache-2.0"
    bits: int = 4
    group_size: int = 32
    vllm_name: str = ""

    @property
    def distribution(self) -> str:
        """``quantserve-NAME``."""
        return f"quantserve-{self.name}"

    @property
    def package(self) -> str:
        """``quantserve_NAME``."""
        return self.distribution.replace("-", "_")

    @property
    def description(self) -> str:
        """The summary, or the kind's."""
        return self.summary or KINDS[self.kind].summary.format(**vars(self))

    def fields(self) -> dict[str, str]:
        """What the fields of the templates stand for."""
        name, _, mail = self.author.rstrip("> ").partition("<")
        author = f"name = {json.dumps(name.strip(), ensure_ascii=False)}" + (f', email = "{mail}"' if mail else "")
        return {
            "name": self.name,
            "distribution": self.distribution,
            "package": self.package,
            "class": "".join(part.capitalize() for part in self.name.split("-")),
            "thing": "command" if self.kind == "command" else "plugin",
            "summary": self.description,
            "authors": f"{{ {author} }}" if self.author else "",
            "license": self.license,
            "requirement": requirement(__version__),
            "api": str(API_VERSION),
            "bits": str(self.bits),
            "group_size": str(self.group_size),
            "per_byte": str(8 // self.bits),
            "hidden": str(max(128, self.group_size)),  # of the checkpoint that the tests write
            "intermediate": str(max(256, 2 * self.group_size)),
            "vllm_name": self.vllm_name,
        }

    def files(self) -> dict[PurePosixPath, str]:
        """Every file by its path in the distribution."""
        fields = self.fields()
        made: dict[PurePosixPath, str] = {}
        for folder in KINDS[self.kind].templates:
            for path, template in _templates(files(__package__) / "templates" / folder, PurePosixPath()):
                text = _PART.sub(lambda part: part[2] if self.kind in part[1].split() else "", template)
                made[self._place(path)] = _FIELD.sub(lambda field: fields[field[1]], text)
        return made

    def write(self, folder: Path) -> list[Path]:
        """Write the distribution into a new folder, whole or not at all.

        Raises:
            UsageError: the folder is there already, or cannot be written.
        """
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise UsageError(f"{folder} exists already\n  fix: name another folder with --folder") from None
        except OSError as error:
            raise UsageError(f"cannot create {folder}: {error.strerror}\n  fix: name another --folder") from error
        try:
            for path, text in self.files().items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(text, encoding="utf-8")
        except BaseException:
            shutil.rmtree(folder)
            raise
        return sorted(path for path in folder.rglob("*") if path.is_file())

    def _place(self, path: PurePosixPath) -> PurePosixPath:
        parts = (self.package if part == "package" else part for part in path.with_suffix("").parts)
        return PurePosixPath(*(re.sub("^dot-", ".", part) for part in parts))


def requirement(version: str) -> str:
    """The versions of a distribution that keep what this one has: ``>=0.1,<0.2``."""
    major, minor = Version(version).release[:2]
    return f">={major}.{minor},<{f'0.{minor + 1}' if major == 0 else major + 1}"


def _templates(folder: Traversable, inside: PurePosixPath) -> Iterator[tuple[PurePosixPath, str]]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _templates(entry, inside / entry.name)
        elif entry.name.endswith(".tmpl"):
            yield inside / entry.name, entry.read_text(encoding="utf-8")
