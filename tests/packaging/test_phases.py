"""scripts/run_tests.py and the phases of conftest.py, on a folder with four tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BESIDE = """
import os
def test_passes(): open("beside", "a").write(os.environ["PYTEST_XDIST_WORKER"])
def test_may_fail(): assert not os.path.exists("fail")
"""
ALONE = """
import os, pytest
@pytest.mark.alone
def test_alone(): open("alone", "a").write(os.environ.get("PYTEST_XDIST_WORKER", "none"))
@pytest.mark.alone
@pytest.mark.slow
def test_may_fail(): assert not os.path.exists("fail late")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_beside.py").write_text(BESIDE)
    (tmp_path / "tests" / "test_alone.py").write_text(ALONE)
    return tmp_path


def run(folder: Path, *arguments: str) -> tuple[int, list[str], set[str]]:
    """The exit code, what the script says of each phase, and the phases of which a test passed."""
    command = [sys.executable, str(ROOT / "scripts" / "run_tests.py"), "-p", "no:cacheprovider", *arguments]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, env=environ)
    said = re.findall(r"^(\w+: .*) in [\d.]+ min$", done.stdout, re.MULTILINE)
    assert said, done.stdout + done.stderr
    return done.returncode, said, {name for name in ("beside", "alone") if (folder / name).exists()}


def test_each_test_runs_in_its_phase_and_a_failure_of_one_does_not_hide_the_other(folder: Path) -> None:
    (folder / "fail").touch()
    assert run(folder) == (1, ["beside: failed with exit code 1", "alone: passed"], {"beside", "alone"})
    assert (folder / "beside").read_text().startswith("gw")
    assert (folder / "alone").read_text() == "none"
    (folder / "fail").rename(folder / "fail late")
    assert run(folder)[:2] == (1, ["beside: passed", "alone: failed with exit code 1"])


def test_with_x_a_failure_is_the_end(folder: Path) -> None:
    (folder / "fail").touch()
    assert run(folder, "-x")[1:] == (["beside: failed with exit code 2"], {"beside"})


def test_arguments_that_select_nothing_in_one_phase_are_no_failure(folder: Path) -> None:
    code, said, ran = run(folder, "-k", "test_alone or nothing", "-m", "not slow")
    assert (code, said, ran) == (0, ["beside: no test selected", "alone: passed"], {"alone"})
