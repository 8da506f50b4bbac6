"""What plugins say about their kernels: the contract, every installed method, and what calibration times."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.predicted import flat
from quantserve.method import Method, QualityNote
from quantserve.planning.expectation import kernel_of, quality_of, width_of
from quantserve.plugins.contract import kernel_breach, quality_breach
from quantserve.plugins.registry import Registry
from quantserve.predict.machine import ENGINE_2023, ENGINE_NOW
from quantserve.target import find_target, known_targets

METHODS = ("fp16", "awq", "squeezellm")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": 7}, "name is int"),
        ({"bits_per_weight": 0}, "bits_per_weight"),
        ({"uncertainty": True}, "uncertainty"),
        ({"bandwidth_share": ()}, "bandwidth_share"),
        ({"bandwidth_share": ((4, 0.5), (1, 0.5))}, "rise"),
        ({"bandwidth_share": ((0, 0.5),)}, "rows"),
        ({"flops_share": ((1, 0),)}, "shares"),
        ({"flops_share": ((1, 7.0),)}, "at most 6"),
        ({"bandwidth_share": ((1, 2.0),)}, "at most 1.5"),
        ({"flops_share": [(1, 0.5)]}, "tuple"),
        ({"flops_share": ((1, "much"),)}, "shares"),
        ({"experts": None}, "experts"),
    ],
)
def test_a_profile_that_breaks_the_contract(change: dict[str, Any], says: str) -> None:
    assert kernel_breach(flat(4)) == ""
    assert says in kernel_breach(replace(flat(4), **change))


def test_a_note_that_breaks_the_contract() -> None:
    note = QualityNote(5.6, 5.47, "model", "paper")
    assert quality_breach(note) == ""
    assert "perplexities" in quality_breach(replace(note, perplexity=-1))
    assert "source" in quality_breach(replace(note, source=""))
    assert "not QualityNote" in quality_breach(0.13)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("engine", [ENGINE_NOW, ENGINE_2023])
def test_installed_methods_keep_it_on_every_target(name: str, engine: str) -> None:
    plugin = Registry.load({}).find_method(name)
    assert plugin.method is not None
    for target in known_targets().values():
        for bits in plugin.method.bits:
            kernel = kernel_of(plugin, target, bits, engine)
            if engine == ENGINE_NOW and target.device in plugin.method.devices:
                assert kernel is not None
                assert kernel.source
                assert bits <= kernel.bits_per_weight < bits + 0.5


@pytest.mark.parametrize("name", ["awq", "squeezellm"])
def test_quality_falls_with_the_bits(name: str) -> None:
    plugin = Registry.load({}).find_method(name)
    assert plugin.method is not None
    losses = [note.increase for bits in sorted(plugin.method.bits) if (note := quality_of(plugin, bits))]
    assert losses == sorted(losses, reverse=True)
    assert all(0 < loss < 0.2 for loss in losses)
    assert quality_of(Registry.load({}).find_method("fp16"), 16) is None


def test_the_width_follows_from_the_stored_bits() -> None:
    method = Method("m", "s", (3, 4), None)
    assert [width_of(method, stored) for stored in (None, 3.06, 3.9, 4.0, 4.9, 16, 2)] == [4, 3, 3, 4, 4, 4, 3]


@pytest.mark.parametrize(("name", "bits"), [("fp16", 16), ("awq", 4), ("squeezellm", 4), ("squeezellm", 3)])
def test_what_calibration_times_multiplies_the_right_shape(name: str, bits: int) -> None:
    kernel = kernel_of(Registry.load({}).find_method(name), find_target("cpu"), bits)
    assert kernel is not None
    module, _, function = kernel.benchmark.partition(":")
    if name == "fp16":
        pytest.importorskip("vllm")
    call, nbytes = getattr(importlib.import_module(module), function)(256, 512, bits)
    assert nbytes == pytest.approx(256 * 512 * kernel.bits_per_weight / 8, rel=0.25)
    for rows in (1, 7, 64):
        y = call(torch.randn(rows, 512).bfloat16())
        assert y.shape == (rows, 256)
        assert torch.isfinite(y.float()).all()
