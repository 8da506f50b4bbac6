"""The documentation site builds without warnings, is complete, and loads nothing from other hosts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantserve import api
from quantserve.plugins.contract import HOOKS

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


def test_every_page_can_be_searched(site: Path) -> None:
    found = {
        entry["location"].partition("#")[0]
        for entry in json.loads((site / "search/search_index.json").read_text())["docs"]
    }
    pages = {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} - {"index.html"}
    methods = {f"plugins/{path.parent.name}/index.html" for path in ROOT.glob("plugins/*/README.md")}
    assert pages | methods <= found


def test_the_api_page_has_every_hook_and_every_public_name(site: Path) -> None:
    page = (site / "api.html").read_text()
    anchors = set(re.findall(r'id="quantserve\.(?:hookspecs|api)\.(\w+)"', page))
    assert {*HOOKS, *api.__all__} <= anchors


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text()
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]*\bsrc="?([^"\s>]+)', text)
        loaded += re.findall(r'<link[^>]*rel="?(?:stylesheet|icon|preload)[^>]*href="?([^"\s>]+)', text)
        assert loaded, path.name
        assert not [one for one in loaded if "//" in one], path.name


def test_every_link_to_a_page_leads_somewhere(site: Path) -> None:
    broken = [
        f"{path.relative_to(site)}: {target}"
        for path in site.rglob("*.html")
        if path.name != "404.html"
        for target in re.findall(r'<a[^>]*href="?([^"#?\s>]+)', path.read_text())
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert not broken
