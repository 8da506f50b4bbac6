"""examples/prepare.py: the exports appear whole, once, and again when their source changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.checkpoints import make_llama
from helpers.environments import ROOT
from quantserve.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow


def prepare(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(folder / "prepare.py")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def test_exports_are_made_once_and_after_a_change(tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples" / "prepare.py", tmp_path)
    demo = tmp_path / "demo-model"
    make_llama(demo / "checkpoint", layers=1)

    first = prepare(tmp_path)
    assert first.returncode == 0, first.stderr
    assert {path.name for path in demo.iterdir()} == {"checkpoint", "awq", "squeezellm"}
    for method in ("awq", "squeezellm"):
        exported = open_checkpoint(str(demo / method))
        assert exported.problems == ()
        assert (exported.quantization_config or {})["quant_method"] == method

    second = prepare(tmp_path)
    assert (second.returncode, second.stdout) == (0, "")

    config = demo / "checkpoint" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 5e5}))
    (demo / "awq" / "leftover").touch()
    third = prepare(tmp_path)
    assert third.returncode == 0, third.stderr
    assert open_checkpoint(str(demo / "awq")).config["rope_theta"] == 5e5
    assert not (demo / "awq" / "leftover").exists()


def test_a_missing_plugin_is_one_clear_message(tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples" / "prepare.py", tmp_path)
    make_llama(tmp_path / "demo-model" / "checkpoint", layers=1)
    done = prepare(tmp_path, QUANTSERVE_DISABLE="awq")
    assert done.returncode == 2
    assert "QUANTSERVE_DISABLE" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "demo-model" / "awq").exists()
