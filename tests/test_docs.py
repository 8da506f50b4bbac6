"""The documentation says what the code does: hooks, commands, keys, examples, links."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from helpers import tutorial
from helpers.checkpoints import make_llama
from helpers.dists import Site
from quantserve.cli.main import COMMANDS, EXTRAS, run
from quantserve.config import json_schema, load_object
from quantserve.plugins.contract import HOOKS

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
FOLDERS = (".", "docs", "bench", "quantize", "client", "explorer", "kernels", "plugins/*", "models", "examples/**")
MARKDOWN = [path for folder in FOLDERS for path in sorted(ROOT.glob(f"{folder}/*.md"))]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def headings(path: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", without_code(path), re.MULTILINE)


def without_code(path: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def blocks(path: Path, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", path.read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


@pytest.fixture(scope="module")
def update_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("update_docs", ROOT / "scripts" / "update_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_hook_is_a_heading_with_its_arguments() -> None:
    expected = {f"{name}({', '.join(inspect.signature(spec).parameters)})" for name, spec in HOOKS.items()}
    documented = {title for title in headings(ROOT / "docs" / "plugins.md") if title.startswith("quantserve_")}
    assert documented == expected


def test_every_command_is_documented() -> None:
    documented = {title.removeprefix("quantserve ") for title in headings(ROOT / "docs" / "cli.md")[1:]}
    assert documented == {*COMMANDS, *EXTRAS}


def test_every_section_of_the_config_is_documented() -> None:
    text = (ROOT / "docs" / "config.md").read_text()
    assert set(re.findall(r"<!-- generated: config (\w+) -->", text)) == set(json_schema()["$defs"])


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_generated_parts_are_current(path: Path, update_docs: ModuleType) -> None:
    assert update_docs.updated(path.read_text()) == path.read_text(), "run `make docs`"


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for groups in LINK.findall(without_code(path)):
        target, _, anchor = (groups[0] or groups[1]).partition("#")
        if "://" in target:
            continue
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), f"{path.name}: {target}"
        if anchor and there.suffix == ".md":  # pictures have #only-light and #only-dark
            assert anchor in {slug(title) for title in headings(there)}, f"{path.name}: {target}#{anchor}"


def slug(title: str) -> str:
    """The anchor a Markdown renderer gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_the_text_exist(path: Path) -> None:
    text = path.read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^    |`)make ([a-z0-9-]+)", text, re.MULTILINE)) <= targets
    used = re.findall(r"(?:^    |`)(?:\S*/)?(?:python -m )?quantserve ([a-z-]+)", text, re.MULTILINE)
    assert set(used) <= {*COMMANDS, *EXTRAS}


def test_the_tutorial_makes_a_working_format(tmp_path: Path) -> None:
    """The blocks of docs/plugins.md in the generated project; tests/packaging installs, proves and serves it."""
    project, lines = tutorial.make(tmp_path)
    (said,) = re.findall(r"lines that differ from what was generated: (\d+)", tutorial.PAGE.read_text())
    assert lines == int(said) <= 60
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=project, capture_output=True)
    assert done.returncode == 0, done.stdout
    code = """
import torch
from quantserve_log4.engine import Log4Format
from quantserve_log4.quantize import encode
from reference import dequantize
weight = torch.randn(64, 256)
stored = encode(weight)
expected = dequantize(stored)
packed = Log4Format.pack(None, stored, None).dequantize().float()
assert (packed - expected).abs().max() < 1e-6 * expected.abs().max()
assert ((expected - weight).abs() / weight.abs().clamp(min=0.5)).mean() < 0.1
"""
    variables = {**os.environ, "PYTHONPATH": f"{project / 'src'}{os.pathsep}{project / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_command_of_the_text_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = next(block for block in blocks(ROOT / "docs" / "plugins.md", "python") if "@click.command" in block)
    site = Site(tmp_path / "site")
    site.path.mkdir()
    site.command("quantserve-sizes", code, name="sizes")
    monkeypatch.syspath_prepend(str(site.path))
    model = make_llama(tmp_path / "model")
    assert run(["sizes", str(model)]) == 0
    file = (model / "model.safetensors").read_bytes()
    assert int(capsys.readouterr().out) == len(file) - 8 - int.from_bytes(file[:8], "little")
    site.forget()


def test_the_format_of_the_text_packs() -> None:
    code = next(block for block in blocks(ROOT / "docs" / "plugins.md", "python") if "quantserve_kernels" in block)
    names: dict[str, Any] = {"Format": object}
    exec(code.replace("from quantserve_kernels.vllm import Format\n", ""), names)
    words = torch.randint(0, 256, (6, 64), dtype=torch.uint8)
    scale = torch.rand(6, 2).half()
    for part, tensor in (("qweight", words), ("scale", scale)):
        assert names["SCHEME"].parts[part].fits(tuple(tensor.shape), 6, 128)
    packed = names["MyMethod"]().pack({"qweight": words, "scale": scale}, None)
    codes = torch.stack((words & 15, words >> 4), dim=-1).flatten(1)
    weight = (codes.float() - 8) * scale.float().repeat_interleave(64, 1)
    torch.testing.assert_close(packed.dequantize().float(), weight, rtol=1e-3, atol=1e-3)


def test_the_example_config_loads() -> None:
    model, app, adapted = (yaml.safe_load(block) for block in blocks(ROOT / "docs" / "config.md", "yaml"))
    loaded = load_object(model, "docs/config.md")
    assert loaded.models[0].model_id == "TheBloke/Llama-2-7B-chat-AWQ"
    assert loaded.notes == []
    assert set(app) == {"models", "http"}
    adapters = load_object(adapted, "docs/config.md").models[0].adapters
    assert [one.name for one in adapters] == ["sql-writer", "org/poet", "support"]
    served = yaml.safe_load(blocks(ROOT / "docs" / "serving.md", "yaml")[0])
    assert served["applications"][0]["import_path"] == "quantserve.serve.app:build"
