"""The decode benchmark: engines in groups that fit into memory, and ratios to the reference of the same round."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.console import BenchError
from benchmarks.decode import measure, results
from benchmarks.decode.shapes import QUICK
from benchmarks.decode.variants import REFERENCE, VARIANTS, choose

NAMES = (REFERENCE, "awq", "squeezellm", "fp8")


def engines(gib: float, names: tuple[str, ...] = NAMES) -> list[list[str]]:
    """The groups on a machine with so much memory, without weights."""
    chosen = [VARIANTS[name] for name in names]
    return [[variant.name for variant in group] for group in measure.groups(chosen, QUICK)]


def test_engines_run_side_by_side_as_far_as_memory_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "size", lambda path: 0)
    one = measure.KV_GIB + measure.OVERHEAD_GIB
    for fit, expected in {
        4: [list(NAMES)],
        3: [[REFERENCE, "awq", "squeezellm"], [REFERENCE, "fp8"]],
        2: [[REFERENCE, "awq"], [REFERENCE, "squeezellm"], [REFERENCE, "fp8"]],
    }.items():
        monkeypatch.setattr(measure, "available_gib", lambda fit=fit: (fit + 0.5) * one)
        assert engines(fit) == expected
    monkeypatch.setattr(measure, "available_gib", lambda: 1.5 * one)
    with pytest.raises(BenchError, match="bf16 and awq side by side need about 4 GiB, and 3 are free"):
        engines(1)
    assert engines(1, (REFERENCE,)) == [[REFERENCE]]


def test_a_ratio_is_that_of_the_same_round_of_the_same_group() -> None:
    run: dict[str, Any] = {
        "threads": 1,
        "rounds": 2,
        "units": {"decode 1": "tok/s", "prefill 64": "ms"},
        "values": {
            REFERENCE: {"decode 1": [10.0, 20.0, 40.0, 50.0], "prefill 64": [8.0, 4.0, 2.0, 1.0]},
            "awq": {"decode 1": [30.0, 60.0], "prefill 64": [4.0, 2.0]},
            "fp8": {"decode 1": [80.0, 100.0], "prefill 64": [4.0, 2.0]},
        },
        "begins": {"awq": {"decode 1": 0, "prefill 64": 0}, "fp8": {"decode 1": 2, "prefill 64": 2}},
        "errors": {},
    }
    assert results.ratios(run) == {
        REFERENCE: {"decode 1": 1.0, "prefill 64": 1.0},
        "awq": {"decode 1": 3.0, "prefill 64": 2.0},
        "fp8": {"decode 1": 2.0, "prefill 64": 0.5},
    }
    assert "| fp8 | 90.0 (2.00x) | 3.0 (0.50x) |" in " ".join(results.speed_table(run).split())


def test_all_variants_can_be_named_at_once() -> None:
    assert [variant.name for variant in choose("all")] == list(VARIANTS)
    with pytest.raises(BenchError, match="unknown variant fp7"):
        choose("fp7")
