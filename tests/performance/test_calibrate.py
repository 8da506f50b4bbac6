"""What `quantserve calibrate` finds in known measurements, and that it measures the installed kernels."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from performance.test_calibration import calibration
from quantserve.calibrate import measure
from quantserve.calibrate.engine import DECODES, LAYERS, PROMPTS, Point, fit, shape_of
from quantserve.calibrate.measure import kernels_of
from quantserve.cli.main import run
from quantserve.plugins.registry import Registry
from quantserve.predict.calibration import load
from quantserve.predict.machine import EngineCost, linear_cost, machine_of
from quantserve.predict.prediction import PLAIN
from quantserve.predict.step import batch_of, step_cost
from quantserve.target import this_cpu


def points(costs: EngineCost) -> list[Point]:
    """What an engine with these costs would take, by the formulas themselves."""
    machine = replace(machine_of(this_cpu(), calibration()), engine=costs)
    plain = linear_cost(machine, PLAIN, "fp16-16")
    batches = [batch_of([(1, 76, True)] * count) for count in DECODES]
    batches += [batch_of([(tokens, 0, True)]) for tokens in PROMPTS]
    return [
        Point(layers, batch, step_cost(shape_of(layers), machine, plain, plain, batch).total)
        for layers in LAYERS
        for batch in batches
    ]


def test_the_fit_finds_the_costs_that_were_put_in() -> None:
    costs = EngineCost(2e-3, 7e-5, 3e-4, 1.2e-9, 0.0, 0.0, 0.0)
    found = fit(calibration(engine=None), points(costs))
    assert found.step_s == pytest.approx(costs.step_s, rel=0.1)
    assert found.layer_s == pytest.approx(costs.layer_s, rel=0.1)
    assert found.request_s == pytest.approx(costs.request_s, rel=0.1)
    assert found.element_s == pytest.approx(costs.element_s, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_turn_a_step_into_layers(seed: int) -> None:
    usual = machine_of(this_cpu(), calibration(engine=None)).engine
    chance = random.Random(seed)
    noisy = [replace(point, seconds=point.seconds * chance.gauss(1, 0.03)) for point in points(usual)]
    found = fit(calibration(engine=None), noisy)
    assert 0.3 * usual.step_s < found.step_s < 3 * usual.step_s
    assert found.layer_s < 4 * usual.layer_s


def test_a_call_has_its_price() -> None:
    cheap = calibration()
    dear = replace(cheap, calls={"awq_codebook-4": 1e-4})
    machines = [machine_of(this_cpu(), one) for one in (cheap, dear)]
    seconds = [linear_cost(machine, PLAIN, "awq_codebook-4").seconds(1, 1024, 1024) for machine in machines]
    assert seconds[1] - seconds[0] == pytest.approx(1e-4)


def test_the_fit_gives_no_negative_costs() -> None:
    faster = [replace(point, seconds=0.9 * point.seconds) for point in points(EngineCost(0, 0, 0, 1e-15, 0, 0, 0))]
    found = fit(calibration(engine=None), faster)
    assert min(found.step_s, found.layer_s, found.request_s, found.element_s) >= 0


def test_every_installed_method_names_a_kernel_of_this_cpu() -> None:
    kernels, _ = kernels_of(Registry.load(), this_cpu())
    assert {"fp16-16", "awq_vllm-4", "awq_codebook-4", "squeezellm-4", "squeezellm-3"} <= {
        kernel.key for kernel in kernels
    }


@pytest.mark.slow
def test_calibrate_writes_what_predictions_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"N": 1024, "K": 1024, "SMALL_N": 256, "SMALL_K": 256, "WORKING_SET": 1 << 20}.items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(measure, "_CELL_SECONDS", 0.05)
    path = tmp_path / "calibration.json"
    monkeypatch.setenv("QUANTSERVE_CALIBRATION", str(path))
    assert run(["calibrate", "--quick", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = load(path)
    assert printed["seconds"] == found.seconds
    assert {"fp16-16", "awq_vllm-4", "awq_codebook-4", "squeezellm-4"} <= set(found.kernels)
    for table in found.kernels.values():
        assert [rows for rows, _ in table] == [1, 4, 16, 64, 512]
        assert all(seconds > 0 for _, seconds in table)
    assert set(found.calls) == set(found.kernels)
    assert all(call >= 0 for call in found.calls.values())
    assert 0 < found.read_bytes_per_s < 1e13
