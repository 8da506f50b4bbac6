"""examples/prepare.py: the exports appear whole, once, and again when their source changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from helpers.environments import ROOT
from helpers.tiny_squeezellm import write_llama
from helpers.tokenizer import write_words
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


def source(folder: Path) -> Path:
    """A model with random weights, and a text of its words."""
    demo = folder / "demo-model"
    write_llama(demo / "checkpoint")
    write_words(demo / "checkpoint", 97)
    (demo / "calibration.txt").write_text(" ".join(f"w{number * number % 97}" for number in range(32 * 256)))
    return demo


def test_exports_are_made_once_and_after_a_change(tmp_path: Path) -> None:
    shutil.copy(ROOT / "examples" / "prepare.py", tmp_path)
    demo = source(tmp_path)

    first = prepare(tmp_path)
    assert first.returncode == 0, first.stderr
    assert {path.name for path in demo.iterdir()} == {"checkpoint", "calibration.txt", "awq", "squeezellm"}
    for method in ("awq", "squeezellm"):
        exported = open_checkpoint(str(demo / method))
        assert exported.problems == ()
        assert (exported.quantization_config or {})["quant_method"] == method
        made = json.loads((demo / method / "quantserve.json").read_text())
        assert made["calibration"]["text"] == "calibration.txt"
        assert all(0 < layer["output_error"] < 0.3 for layer in made["layers"].values())

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
    source(tmp_path)
    done = prepare(tmp_path, QUANTSERVE_DISABLE="awq")
    assert done.returncode == 2
    assert "QUANTSERVE_DISABLE" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "demo-model" / "awq").exists()
