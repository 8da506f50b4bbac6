"""What keeps a new plugin from its name or its settings, said with the fix."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Final

from quantserve.checks.formats import FORMATS, format_title
from quantserve.errors import UsageError, unknown_name
from quantserve.families import VLLM, quantization_methods
from quantserve.new_plugin.project import Project
from quantserve.plugins.claims import OURS
from quantserve.plugins.entry_points import RESERVED, origin
from quantserve.plugins.registry import Registry

LONGEST_NAME: Final = 40
LONGEST_SUMMARY: Final = 80
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_AUTHOR = re.compile(r"[^<>\"\\]+(<[^<>\s\"\\]+@[^<>\s\"\\]+>)?")
_LICENSE = re.compile(r"[A-Za-z0-9.+() -]+")


def check(project: Project, commands: Collection[str]) -> None:
    """Refuse what cannot become a distribution, or would not be used beside what is installed.

    Args:
        project: as asked for.
        commands: names that `quantserve` and its own distributions have.

    Raises:
        UsageError: the first problem, with its fix.
    """
    for problem, fix in _problems(project, commands):
        raise UsageError(f"{problem}\n  fix: {fix}")


def spelling(name: str) -> tuple[str, str] | None:
    """What is wrong with a name by itself, and the fix."""
    right = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").removeprefix("quantserve-")
    right = right[:LONGEST_NAME].strip("-")
    use = f"use {right!r}" if _NAME.fullmatch(right) else "use a word such as 'mymethod'"
    if len(name) > LONGEST_NAME:
        return f"a name of {len(name)} characters; at most {LONGEST_NAME}", use
    if not _NAME.fullmatch(name):
        return f"{name!r} cannot name a plugin: lower-case letters, digits and single hyphens, a letter first", use
    if name.startswith("quantserve-"):
        return f"{name!r} would become the distribution 'quantserve-{name}'", f"{use}; quantserve- is put before it"
    if name in (*RESERVED, "kernels"):
        return f"{name!r} is reserved for quantserve itself", "choose another name"
    return None


def _problems(project: Project, commands: Collection[str]) -> Iterator[tuple[str, str]]:
    name, other = project.name, "choose another name"
    if wrong := spelling(name):
        yield wrong
    if name in OURS or name in commands:
        what = "method" if name in OURS else "command"
        yield f"{name!r} is a {what} of quantserve itself (quantserve-{name})", other
    yield from _clashes(project)
    if project.kind == "vllm-method":
        known = quantization_methods()
        if project.vllm_name not in known:
            fix = "name one of them with --vllm-name, or make a method of your own with --codebook or --custom"
            yield f"vLLM {VLLM}: {unknown_name('method', project.vllm_name or name, known)}", fix
    elif project.kind != "command":
        for taken in (*FORMATS, *quantization_methods()):
            if name == taken.replace("_", "-").replace("/", "-"):
                fix = f"{other}; for a method that vLLM has, --vllm-method"
                yield f"{name!r} is the name of a format that exists ({format_title(taken)})", fix
    summary = project.summary
    if len(summary) > LONGEST_SUMMARY or not summary.isprintable() or re.search(r"[\"\\{}]", summary):
        problem = f"the summary must be one line of at most {LONGEST_SUMMARY} characters, without quotes, braces and \\"
        yield f"{problem}: {summary[: LONGEST_SUMMARY + 10]!r}", "give a shorter, plain one with --summary"
    if project.author and not (_AUTHOR.fullmatch(project.author) and project.author.isprintable()):
        yield f"{project.author!r:.100} is no author", "write --author 'Name' or --author 'Name <name@example.org>'"
    if not _LICENSE.fullmatch(project.license):
        yield f"{project.license!r:.100} is no SPDX expression", "write for example --license Apache-2.0"


def _clashes(project: Project) -> Iterator[tuple[str, str]]:
    """What is installed under the names that the distribution would have."""
    name = project.name
    fix = "choose another name, or uninstall it first"
    try:
        yield f"{project.distribution} {version(project.distribution)} is installed", fix
    except PackageNotFoundError:
        if find_spec(project.package) is not None:
            yield f"a package {project.package} can be imported here", fix
    registry = Registry.load()
    for point in registry.points:
        if point.name == name:
            yield f"the entry point {name!r} of {point.group} belongs to {' '.join(origin(point))}", fix
    if project.kind != "command" and (owner := registry.methods.get(name)):
        yield f"{name!r} is a method name or an alias of {owner.label}", fix


def note(project: Project) -> str:
    """What an author should know of a name that is allowed; "" for nothing."""
    owner = Registry.load().methods.get(project.vllm_name) if project.kind == "vllm-method" else None
    if owner is None:
        return ""
    return (
        f"files that declare {project.vllm_name!r} belong to {owner.label}, which is asked first; users choose yours "
        f"with engine_kwargs.quantization: {project.name}"
    )
