"""The calibration file: what is stored, when it is used, and what is said when it is not."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from helpers.predicted import LLAMA_7B, expected
from quantserve.errors import UsageError
from quantserve.predict.calibration import Calibration, default_path, find_calibration, fingerprint, load, save
from quantserve.predict.machine import EngineCost, machine_of
from quantserve.predict.workload import WORKLOADS
from quantserve.target import find_target, this_cpu

ENGINE = EngineCost(1e-3, 2e-5, 3e-4, 1e-9, 0.0, 0.0, 5e-3, source="measured")


def calibration(**changes: Any) -> Calibration:
    made = Calibration(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=fingerprint(this_cpu()),
        versions={"torch": "2.13.0"},
        threads=1,
        read_bytes_per_s=40e9,
        matmul_flops_per_s=500e9,
        kernels={"fp16-16": ((1, 5e-11), (512, 2e-9)), "awq_codebook-4": ((1, 1e-11), (512, 2e-9))},
        about={"awq_codebook-4": "quantserve-kernels"},
        engine=ENGINE,
        seconds=12.5,
    )
    return replace(made, **changes)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    where = tmp_path / "cache" / "calibration.json"
    monkeypatch.setenv("QUANTSERVE_CALIBRATION", str(where))
    return where


def test_it_survives_the_file(path: Path) -> None:
    save(calibration(), path)
    assert load(path) == calibration(created=load(path).created)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QUANTSERVE_CALIBRATION", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "quantserve" / "calibration.json"


def test_predictions_for_this_cpu_use_it(path: Path) -> None:
    without = expected(LLAMA_7B, "awq", "cpu").predict(WORKLOADS["single"])
    save(calibration(), path)
    made = expected(LLAMA_7B, "awq", "cpu")
    prediction = made.predict(WORKLOADS["single"])
    assert (without.source, prediction.source) == ("roofline", "calibration")
    assert prediction.uncertainty < without.uncertainty
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert prediction.decode_step.linears == pytest.approx(weights * 1e-11)
    assert prediction.decode_step.lm_head == pytest.approx(32000 * 4096 * 5e-11)
    assert prediction.decode_step.overhead == pytest.approx(1e-3 + 32 * 2e-5 + 3e-4)


def test_a_kernel_that_was_not_measured_stays_a_roofline(path: Path) -> None:
    save(calibration(), path)
    made = expected(LLAMA_7B, "squeezellm", "cpu")
    assert made.predict(WORKLOADS["single"]).source == "roofline"
    assert any("not in the calibration" in note for note in made.notes)


def test_an_eager_model_has_costs_of_its_own(path: Path) -> None:
    save(calibration(eager=replace(ENGINE, layer_s=9e-4)), path)
    target = this_cpu()
    found = find_calibration(target).calibration
    assert machine_of(target, found).engine.layer_s == ENGINE.layer_s
    assert machine_of(target, found, eager=True).engine.layer_s == 9e-4
    assert machine_of(target, eager=True).engine.layer_s > machine_of(target).engine.layer_s


def test_a_disturbed_one_says_so(path: Path) -> None:
    save(calibration(disturbed=0.3), path)
    found = find_calibration(this_cpu()).calibration
    assert found is not None
    assert any("30%" in note for note in found.notes)


def test_other_targets_do_not_use_it(path: Path) -> None:
    save(calibration(), path)
    assert find_calibration(find_target("a100-80g")).calibration is None
    assert machine_of(find_target("a100-80g")).bandwidth == 2039e9


def test_an_old_one_is_used_and_says_so(path: Path) -> None:
    created = datetime.now(UTC) - timedelta(days=200)
    save(calibration(created=created.isoformat()), path)
    found = find_calibration(this_cpu()).calibration
    assert found is not None
    assert any("200 days old" in note for note in found.notes)


def test_one_of_another_machine_is_not_used(path: Path) -> None:
    save(calibration(machine={**fingerprint(this_cpu()), "cpu": "Example 9000"}), path)
    found = find_calibration(this_cpu())
    assert found.calibration is None
    assert "Example 9000" in found.note
    assert any("another machine" in note for note in expected(LLAMA_7B, "awq", "cpu").notes)


def test_default_engine_costs_are_named_as_such(path: Path) -> None:
    save(calibration(engine=None), path)
    found = find_calibration(this_cpu()).calibration
    assert found is not None
    assert any("default" in note for note in found.notes)


def damage(**changes: Any) -> str:
    return json.dumps({**calibration().to_json(), **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"version": 2}',
        "[" * 100_000,
        damage(version=1),
        damage(read_bytes_per_s=-1),
        damage(read_bytes_per_s="fast"),
        damage(matmul_flops_per_s=float("inf")),
        damage(kernels={"fp16-16": [[1, 0]]}),
        damage(kernels=[1]),
        damage(engine={"step_s": 1}),
        damage(created="yesterday"),
        damage(machine=3),
    ],
)
def test_a_damaged_file_is_a_note_and_no_crash(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    found = find_calibration(this_cpu())
    assert found.calibration is None
    assert str(path) in found.note
    assert expected(LLAMA_7B, "awq", "cpu").predict(WORKLOADS["single"]).source == "roofline"


def test_a_folder_that_cannot_be_written_is_the_users_to_correct(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--out"):
        save(calibration(), tmp_path / "file" / "calibration.json")
