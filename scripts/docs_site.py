"""Hooks of MkDocs: publish the Markdown files outside docs/ to which the pages link, and the sources as pages of code.

A file ``X/README.md`` of the repository becomes the page ``X/index.md``, another Markdown file keeps its path, and a
source ``X/y.py`` becomes ``X/y.py.md``. Links are followed from docs/ on: a file is published when a page links to it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?P<text>!?\[[^\]]*\]\()(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
CODE = re.compile(r"(^ *```.*?^ *```)", re.DOTALL | re.MULTILINE)
LANGUAGES = {"Dockerfile": "docker", ".py": "python", ".yaml": "yaml", ".service": "ini", ".json": "json"}
GROUPS = {"Methods": "plugins/*/README.md", "Kernels, examples": "[kme]*/README.md"}
CHANGELOG = "CHANGELOG.md"


def uri(path: str) -> str:
    """The page of a file of the repository; both are relative to their root."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    folder, name = posixpath.split(path)
    if name == "README.md":
        return posixpath.join(folder, "index.md") if folder else "index.md"
    return path if name.endswith((".md", ".svg", ".png")) else f"{path}.md"


def outside(path: str, text: str) -> Iterator[str]:
    """The files to which the Markdown file at ``path`` links, relative to the repository."""
    for match in LINK.finditer(CODE.sub("", text)):
        if "://" not in match["target"]:
            found = resolved(path, match["target"])
            if (ROOT / found).is_file():
                yield found


def resolved(path: str, target: str) -> str:
    """A link of the file at ``path``; the README of a folder stands for the folder."""
    found = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    readme = posixpath.join(found, "README.md")
    return readme if (ROOT / readme).is_file() else found


def relinked(path: str, text: str) -> str:
    """The Markdown file at ``path`` with links to pages of the site; links to folders without a page are plain text."""
    here = posixpath.dirname(uri(path)) or "."

    def link(match: re.Match[str]) -> str:
        if "://" in match["target"]:
            return match[0]
        found = resolved(path, match["target"])
        if (ROOT / found).is_dir():
            return match["text"].removeprefix("[").removesuffix("](")
        return f"{match['text']}{posixpath.relpath(uri(found), here)}{match['anchor'] or ''})"

    return "".join(part if number % 2 else LINK.sub(link, part) for number, part in enumerate(CODE.split(text)))


def page_of(path: str) -> str | bytes:
    """The content of the page of a file outside docs/."""
    if path.endswith((".svg", ".png")):
        return (ROOT / path).read_bytes()
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        return relinked(path, text)
    name = posixpath.basename(path)
    language = next((value for key, value in LANGUAGES.items() if name.endswith(key)), "text")
    return f"---\nsearch:\n  exclude: true\n---\n\n# {name}\n\n`{path}`\n\n````{language}\n{text}\n````\n"


def grouped() -> dict[str, list[str]]:
    """The READMEs in each group of the navigation."""
    return {
        group: sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)) for group, pattern in GROUPS.items()
    }


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the READMEs and the changelog to the navigation."""
    assert config.nav is not None
    groups = [{group: [uri(path) for path in paths]} for group, paths in grouped().items()]
    config.nav = [*config.nav[:3], *groups, *config.nav[3:], {"Changes": CHANGELOG}]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Publish what the pages link to, and what those files link to."""
    todo = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    shown = [CHANGELOG, *(path for paths in grouped().values() for path in paths)]
    todo += shown
    seen = {"README.md"}  # docs/index.md stands for it
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        if path.endswith(".md"):
            todo += outside(path, (ROOT / path).read_text())
        if not path.startswith("docs/"):
            level = InclusionLevel.UNDEFINED if path in shown else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, uri(path), content=page_of(path), inclusion=level))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Relink the pages of docs/; the generated ones are already."""
    return markdown if page.file.generated_by else relinked(f"docs/{page.file.src_uri}", markdown)
