"""Plugins and commands that are wrong in every way a third party can get them wrong, as a project to build."""

from __future__ import annotations

from pathlib import Path

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "quantserve-broken"
version = "0.9"

[project.entry-points."quantserve.plugins"]
cannot-import = "quantserve_broken.cannot_import"
keyword-only = "quantserve_broken.keyword_only"
raises-in-method = "quantserve_broken.raises_in_method"
raises-in-validate = "quantserve_broken.raises_in_validate"
poison = "quantserve_broken.poison"

[project.entry-points."vllm.general_plugins"]
poison = "quantserve_broken:register"

[project.entry-points."quantserve.commands"]
greet = "quantserve_broken.greet:command"
quits = "quantserve_broken.quits:command"
serve = "quantserve_broken.greet:command"
bench = "quantserve_broken.greet:command"

[tool.hatch.build.targets.wheel]
packages = ["quantserve_broken"]
"""

MODULES = {
    "__init__": """
def register():
    raise RuntimeError("poison: no engine of this machine starts")
""",
    "greet": """
import click

@click.command()
@click.argument("name")
def command(name):
    click.echo(f"hello {name}")
    return len(name)
""",
    "quits": "import sys; sys.exit(0)",
    "cannot_import": "import a_module_nobody_has",
    "keyword_only": """
from quantserve.api import hookimpl

@hookimpl
def quantserve_detect(*, checkpoint):
    return True
""",
    "raises_in_method": """
from quantserve.api import hookimpl

@hookimpl
def quantserve_method():
    raise ValueError("not today")
""",
    "raises_in_validate": """
from quantserve.api import hookimpl

@hookimpl
def quantserve_validate(checkpoint, model, target):
    raise KeyError("group_size")
""",
    "poison": """
from quantserve.api import Method, hookimpl

@hookimpl
def quantserve_method():
    return Method(name="poison", summary="breaks every engine that loads it", bits=(4,), vllm_name="poison")
""",
}

COMMANDS = {"greet": "ok", "quits": "failed", "serve": "failed", "bench": "failed"}
"""Command -> its state in `quantserve list`."""

STAGES = {"cannot-import": "load", "keyword-only": "hooks", "raises-in-method": "method"}
"""Plugin -> stage at which `quantserve list` says it failed; the other two fail later, or only in an engine."""


def write_project(path: Path) -> Path:
    """Write the project and return its folder."""
    package = path / "quantserve_broken"
    package.mkdir(parents=True)
    (path / "pyproject.toml").write_text(PYPROJECT)
    for name, code in MODULES.items():
        (package / f"{name}.py").write_text(code)
    return path
