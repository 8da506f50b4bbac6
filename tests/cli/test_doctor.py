"""`quantserve doctor` on the kernels: as installed here, missing, and slow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

import quantserve_kernels
from quantserve.cli import doctor_command
from quantserve.cli.main import run
from quantserve.serve.replica.vllm.patches import PATCHES, VARIABLE
from quantserve.target import known_targets

NAME = f"quantserve-kernels {version('quantserve-kernels')}"


def kernels_row(output: str) -> dict[str, str]:
    row: dict[str, str]
    (row,) = [row for row in json.loads(output) if row["what"] == "kernels"]
    return row


def elsewhere(before: str = "", **environment: str) -> dict[str, str]:
    """The row a process of its own prints, after some code, as on a CPU; fails if it imported torch."""
    code = f"""
import sys
{before}
from quantserve.cli import doctor_command
from quantserve.cli.main import run
from quantserve.serve.replica.vllm.patches import PATCHES, VARIABLE
from quantserve.target import this_cpu
doctor_command.find_target = lambda name: this_cpu()
run(["doctor", "--quick", "--json"])
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, **environment},
    )
    return kernels_row(done.stdout)


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A folder with the real package but for its compiled part."""
    source = Path(quantserve_kernels.__file__).parent
    shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("_C.*", "*.txt", "__pycache__"))
    return tmp_path


def test_the_installed_kernels_are_named_with_their_instruction_set() -> None:
    found = quantserve_kernels.status()
    if not found.native or found.instruction_set == "portable":
        pytest.skip("the kernels of this machine are not fast")
    row = elsewhere()
    assert (row["status"], row["detail"], row["fix"]) == ("ok", f"{NAME}, {found.regimes}", "")


REFUSED = """
from quantserve_kernels import _status
_status._flags = lambda: {flag for sets in _status.INSTRUCTION_SETS.values() for _, flags in sets for flag in flags}
_status._TILE_DATA = 63  # no feature of any processor: refused everywhere
"""


@pytest.mark.skipif(not quantserve_kernels.status().native, reason="the operators are not compiled here")
def test_amx_that_the_system_refuses_is_a_warning_with_the_reason() -> None:
    row = elsewhere(REFUSED)
    assert row["status"] == "warning"
    assert row["detail"].startswith(f"{NAME}, avx512bf16, avx512 for float16 and float32: this processor has AMX, but ")
    assert "arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) is refused here (" in row["detail"]
    assert "seccomp" in row["fix"]


def test_missing_kernels_are_a_warning() -> None:
    row = elsewhere("sys.modules['quantserve_kernels'] = None")
    assert row["status"] == "warning"
    assert row["detail"].startswith("not installed: SqueezeLLM cannot be served")
    assert "pip install --no-build-isolation 'quantserve[kernels]'" in row["fix"]


@pytest.mark.parametrize("note", ["no C++ compiler found (looked for g++)", ""])
def test_kernels_that_were_not_compiled_are_a_warning_with_the_reason(stand_in: Path, note: str) -> None:
    if note:
        (stand_in / "quantserve_kernels" / "build-failure.txt").write_text(f"{note}\nmore about it\n")
    row = elsewhere(PYTHONPATH=str(stand_in))
    assert row["status"] == "warning"
    assert "plain torch, many times slower" in row["detail"]
    assert row["detail"].endswith(note or "built without a compiler")
    assert "g++" in row["fix"]


@pytest.mark.skipif(not quantserve_kernels.status().native, reason="the operators are not compiled here")
def test_portable_kernels_are_a_warning() -> None:
    row = elsewhere(QUANTSERVE_KERNELS_ISA="portable")
    assert row["status"] == "warning"
    assert row["detail"].startswith(f"{NAME}, portable")
    assert "AVX2" in row["fix"]


def test_a_gpu_runs_cuda_and_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor_command, "find_target", lambda name: known_targets()["h100"])
    run(["doctor", "--quick", "--json"])
    row = kernels_row(capsys.readouterr().out)
    assert (row["status"], row["detail"]) == ("ok", f"{NAME}, CUDA and Triton")


@pytest.mark.parametrize(
    ("code", "status", "detail"),
    [
        ("", "ok", "works"),
        ("raise OSError('no library\\n  fix: build it')", "fail", "OSError: no library"),
        ("import sys; sys.exit(3)", "fail", "exit 3"),
    ],
)
def test_a_failing_import_is_reported_with_its_cause(code: str, status: str, detail: str) -> None:
    row = doctor_command._imports("kernels import", code, "make setup")
    assert (row.status, row.detail, row.fix) == (status, detail, "" if status == "ok" else "make setup")


@pytest.mark.slow
def test_without_quick_the_kernels_are_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_command, "_installed", lambda *names: "quantserve-kernels" in names)  # no engine: quick
    run(["doctor", "--json"])
    (row,) = [row for row in json.loads(capsys.readouterr().out) if row["what"] == "kernels import"]
    assert row["status"] == "ok"


def patch_rows(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str, str]]:
    run(["doctor", "--quick", "--json"])
    rows = json.loads(capsys.readouterr().out)
    return [(row["what"], row["status"], row["detail"]) for row in rows if row["what"].startswith("patch")]


def test_patches_that_fit_are_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert patch_rows(capsys) == [("patches", "ok", f"fit: {', '.join(PATCHES)}")]
    monkeypatch.setenv(VARIABLE, ",".join(["none", *PATCHES]))
    fit, *off = patch_rows(capsys)
    assert fit == ("patches", "ok", "fit: none")
    assert {detail.split()[0]: status for _, status, detail in off} == {
        name: "warning" if patch.safety else "ok" for name, patch in PATCHES.items()
    }
    monkeypatch.setenv(VARIABLE, "glue")
    ((what, status, detail),) = patch_rows(capsys)
    assert (what, status) == ("patches", "fail")
    assert "unknown patch 'glue'" in detail


@pytest.mark.parametrize(("name", "status"), [("token-ids", "fail"), ("sched-yield", "warning")])
def test_a_patch_that_does_not_fit_is_a_row(
    name: str, status: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = PATCHES[name].relies_on[0][0]
    monkeypatch.setitem(PATCHES, name, replace(PATCHES[name], relies_on=((target, "no such text"),)))
    row = patch_rows(capsys)[1]
    assert row[:2] == ("patch", status)
    assert row[2].startswith(f"{name}: vllm ")
    assert f"has no `no such text` in {target}" in row[2]
