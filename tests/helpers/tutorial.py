"""The plugin of docs/plugins.md, made as the text says: generated, and its code blocks put in place."""

from __future__ import annotations

import ast
import difflib
import re
import subprocess
import sys
from pathlib import Path

from helpers.environments import ROOT

PAGE = ROOT / "docs" / "plugins.md"


def make(base: Path, python: Path | str = sys.executable) -> tuple[Path, int]:
    """Follow the page in an empty folder.

    Args:
        base: the folder.
        python: of the environment in which quantserve is installed.

    Returns:
        The project, and how many lines of it are not as they were generated.
    """
    command = re.search(r"^    quantserve (new-plugin log4 .*)\n    cd (\S+)$", PAGE.read_text(), re.MULTILINE)
    assert command
    words = [word.strip('"') for word in re.findall(r'"[^"]+"|\S+', command[1])]
    done = subprocess.run([str(python), "-m", "quantserve", *words], cwd=base, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    project, lines = base / command[2], 0
    for path, code in blocks():
        generated = (project / path).read_text()
        made = replaced(generated, code)
        (project / path).write_text(made)
        lines += sum(
            line.startswith("+ ") and bool(line[2:].strip())
            for line in difflib.ndiff(generated.splitlines(), made.splitlines())
        )
    return project, lines


def blocks() -> list[tuple[str, str]]:
    """The blocks whose first line names a file of the project, and that file."""
    found = re.findall(r"^```python\n# (src/\S+|tests/\S+)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(found) == 4
    return found


def replaced(text: str, code: str) -> str:
    """A module in which the top-level definitions of `code` stand for those of the same name."""
    lines = text.splitlines()
    for node in reversed(ast.parse(code).body):
        (old,) = [one for one in ast.parse(text).body if _name(one) == _name(node)]
        assert old.end_lineno
        lines[old.lineno - 1 : old.end_lineno] = ast.get_source_segment(code, node).splitlines()  # type: ignore[union-attr]
        text = "\n".join(lines) + "\n"
    return text


def _name(node: ast.stmt) -> str:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return str(getattr(node, "name", ""))
