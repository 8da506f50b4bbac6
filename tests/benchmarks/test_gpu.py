"""The GPU benchmark on a machine without one: what is refused, what the tables say, and a run on stand-ins."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import report
from benchmarks.console import BenchError
from benchmarks.gpu import formats, results
from benchmarks.gpu.__main__ import main, parser, settings_of
from benchmarks.gpu.formats import CUBLAS
from benchmarks.kernels import shapes

TINY = shapes.Shape("7b", "o", 64, 256)
MODEL = (("qkv", 768, 256), ("o", 256, 256), ("gate_up", 512, 256), ("down", 256, 256))


# --- the command line


def test_options_have_defaults_in_the_order_of_measuring() -> None:
    settings = settings_of(parser().parse_args(["--parts", "kernels,decode"]))
    assert settings.parts == ("decode", "kernels")
    assert {shape.model for shape in settings.shapes} == {"7b"}
    assert settings.formats == ("squeezellm-4", "squeezellm-3", "squeezellm-4-sparse")
    assert (settings.batches[0], settings.batches[-1], settings.rounds, settings.context) == (1, 2048, 7, 512)
    assert settings.seconds == 80


def test_all_formats_are_measured_when_asked_for() -> None:
    assert formats.choose("nf4, squeezellm-3") == ["squeezellm-3", "nf4"]
    assert formats.choose("all") == list(formats.ABOUT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--formats", "awq"], r"unknown format awq; known: squeezellm-4, .*nf4, all"),
        (["--formats", ","], r"unknown format \(none given\)"),
        (["--models", "8b"], r"unknown model 8b; known: 7b"),
        (["--parts", "prefill"], r"unknown part prefill; known: decode, kernels"),
        (["--rounds", "0"], r"1 or more"),
        (["--context", "0"], r"1 or more"),
        (["--seconds", "0"], r"more than 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(arguments: list[str], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        settings_of(parser().parse_args(arguments))


def test_without_a_gpu_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "gpu: no NVIDIA GPU on this machine\n  fix: " in said
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_render_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--render", "--out", str(tmp_path)]) == 1
    assert "results.json does not exist; measure first" in capsys.readouterr().err


# --- what the tables say


def cell(batch: int, layer: str = "o", **seconds: Sequence[float]) -> dict[str, Any]:
    """`four` stands for squeezellm-4 and so on; times in seconds."""
    names = {"cublas": CUBLAS, "four": "squeezellm-4", "three": "squeezellm-3", "sparse": "squeezellm-4-sparse"}
    taken = {names[name]: list(values) for name, values in seconds.items()}
    weight = {
        CUBLAS: 32_000_000,
        "squeezellm-4": 8_000_000,
        "squeezellm-3": 6_000_000,
        "squeezellm-4-sparse": 9_000_000,
    }
    shape = {"model": "7b", "layer": layer, "n": 4096, "k": 4096}
    return {"shape": shape, "batch": batch, "seconds": taken, "bytes": {name: weight[name] for name in taken}}


def found(cells: Sequence[Mapping[str, Any]] = (), **more: Any) -> dict[str, Any]:
    machine = {"cpu": "c", "gpu": "NVIDIA X", "cores": 2, "memory_gib": 1, "isa": [], "python": "3", "versions": {}}
    about = {
        "command": "python -m benchmarks.gpu", "date": "2026-11-30", "machine": machine, "seconds": 80.0,
        "cache_bytes": 50 << 20, "caches": 3, "copy_bytes_per_s": 2.5e12, "formats": list(formats.DEFAULT),
        "decode": None, "errors": [], "refused": {}, "stopped": False,
    }  # fmt: skip
    return {**about, "cells": list(cells), **more}


def decode(batch: int, **seconds: float) -> dict[str, Any]:
    names = {"cublas": CUBLAS, "four": "squeezellm-4", "three": "squeezellm-3"}
    taken = {names[name]: [value] * 5 for name, value in seconds.items()}
    return {"context": 512, "layers": 32, "steps": 50, "cells": [{"batch": batch, "seconds": taken}]}


FULL = found(
    [
        cell(1, cublas=[12e-6, 12e-6, 24e-6], four=[4e-6, 4e-6, 16e-6], three=[6e-6] * 3, sparse=[5e-6, 6e-6, 6e-6]),
        cell(64, cublas=[12e-6] * 3, four=[13e-6] * 3, three=[10e-6] * 3, sparse=[12e-6] * 3),
        cell(2048, cublas=[100e-6] * 3, four=[130e-6] * 3, three=[140e-6] * 3, sparse=[150e-6] * 3),
        cell(1, "down", cublas=[12e-6], four=[8e-6], three=[4e-6], sparse=[4e-6]),
    ],
    decode=decode(1, cublas=5e-3, four=2e-3, three=2.6e-3),
    errors=[
        {"format": "squeezellm-4", "shape": {}, "batch": batch, "error": error}
        for batch, error in ((1, 0.0021), (16, 0.0022), (1, 0.0031), (16, 0.0011))
    ],
)


def squeezed(text: str) -> str:
    """With one space where there are many, and none of the table's padding."""
    return " ".join(text.split())


def test_targets_are_counted_with_their_worst_cell() -> None:
    table = squeezed(results.target_table(FULL))
    assert "squeezellm-4: batch 1, at least 2.5x cuBLAS bf16 | 1 of 2 | **1.50x ✗**: 7b down |" in table
    assert "squeezellm-4-sparse: batch 1, at least 2.5x cuBLAS bf16 | 1 of 2 | **2.40x ✗**: 7b o |" in table
    assert "squeezellm-4: batch 1, at least 60 % of the copy bandwidth | 1 of 2 | **40% ✗**: 7b down |" in table
    assert "squeezellm-3: batch 1, at least 60 %" not in table
    assert "squeezellm-4: batch 1 to 64, never below cuBLAS bf16 | 2 of 3 | **0.92x ✗**: 7b o, batch 64 |" in table
    assert "squeezellm-4: decode loop at batch 1, at least 2x cuBLAS bf16 | 1 of 1 | 2.50x: batch 1 |" in table
    assert "squeezellm-3: decode loop at batch 1, at least 2x cuBLAS bf16 | 0 of 1 | **1.92x ✗**: batch 1 |" in table


def test_ratios_are_taken_within_a_round_and_large_batches_are_not_judged() -> None:
    table = squeezed(results.ratio_table(FULL, "squeezellm-4"))
    assert "| | batch 1 | batch 64 | batch 2048 |" in table
    assert "| 7b o 4096x4096 | 3.00x | **0.92x ✗** | 0.77x |" in table
    assert "| 7b down 4096x4096 | **1.50x ✗** | - | - |" in table


def test_batch_1_is_shown_in_detail() -> None:
    table = squeezed(results.single_table(FULL, formats.DEFAULT))
    assert "| 7b o 4096x4096: cuBLAS bf16 | 12.0 | 32.0 | 2667 | 107% | 1.00x |" in table
    assert "| 7b o 4096x4096: squeezellm-4 | 4.0 | 8.0 | 2000 | 80% | 3.00x |" in table


def test_the_report_has_all_parts() -> None:
    text = results.markdown(FULL)
    assert text.startswith("2026-11-30; NVIDIA X; c, 2 cores")
    assert "    python -m benchmarks.gpu" in text
    assert "Copy bandwidth 2500 GB/s" in text
    titles = [line.removeprefix("### ") for line in text.splitlines() if line.startswith("### ")]
    ratios = [f"{name} relative to cuBLAS bf16" for name in formats.DEFAULT]
    assert titles == ["Targets", "Decode loop", "cuBLAS bf16, µs", *ratios, "Batch 1", "Error"]
    assert "| squeezellm-4 | 2.00 | 2.50x |" in squeezed(text)
    assert "| squeezellm-4 | 0.31% | 0.22% |" in squeezed(text)
    assert "not measured" not in text
    assert "Not complete" not in text


def test_an_early_end_and_what_failed_are_said() -> None:
    text = results.markdown(found(stopped=True, refused={"7b o 4096x4096: nf4": "RuntimeError: no compiler"}))
    assert "the run ended after 80 s, before all was measured" in text
    assert "`7b o 4096x4096: nf4` was not measured: RuntimeError: no compiler" in text
    assert "###" not in text


def test_figures_without_cublas_or_bandwidth_are_left_out() -> None:
    alone = found([cell(1, four=[4e-6]), cell(2, cublas=[4e-6])], copy_bytes_per_s=None)
    text = results.markdown(alone)
    assert "Copy bandwidth" not in text
    assert "| 7b o 4096x4096: squeezellm-4 | 4.0 | 8.0 | 2000 | - | - |" in squeezed(text)
    assert "| 7b o 4096x4096 | - | 4.0 |" in squeezed(text)
    assert results.plot(alone, Path("nowhere")) == []


def test_the_plot_shows_the_mean_over_the_linears() -> None:
    assert results.over_linears(FULL, "squeezellm-4", 1) == pytest.approx((3 * 1.5) ** 0.5)
    assert results.over_linears(FULL, "squeezellm-4", 3) != results.over_linears(FULL, "squeezellm-4", 3)  # NaN


def test_table_and_plot_are_drawn_anew_from_the_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "results.json").write_text(json.dumps(FULL))
    assert main(["--render", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "table.md").read_text() == results.markdown(FULL)
    assert "squeezellm-4-sparse" in (tmp_path / "gpu-speed.svg").read_text()


def test_without_matplotlib_there_is_a_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "can_plot", lambda: False)
    (tmp_path / "results.json").write_text(json.dumps(FULL))
    assert main(["--render", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "table.md").is_file()
    assert "no plots: plots need matplotlib" in capsys.readouterr().err


# --- a run on stand-ins: a CPU for the device, and calls for graphs of them


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `device` without CUDA, a small model and a small linear."""
    pytest.importorskip("torch")
    from benchmarks.gpu import decode, device

    def capture(calls: Sequence[Any]) -> device.Replay:
        return device.Replay(lambda: [call() for call in calls], calls)

    def times(replays: Mapping[str, device.Replay], rounds: int, repeats: int = 1) -> dict[str, list[float]]:
        for replay in replays.values():
            replay.run()
        return {name: [1e-3 * rounds * repeats] for name in replays}

    model = decode.Model(2, 4, 64, 100, tuple(shapes.Shape("tiny", *linear) for linear in MODEL))
    for name, stand_in in {
        "DEVICE": "cpu", "own_stream": contextlib.nullcontext, "cache_bytes": lambda: 10_000,
        "capture": capture, "times": times, "copy_speed": lambda: 1e12, "free": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(device, name, stand_in)
    monkeypatch.setattr(decode, "LLAMA_7B", model)
    monkeypatch.setattr(shapes, "choose", lambda names: [TINY])
    return device


def run(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["--out", str(out), "--seconds", "1e9", "--batches", "1,16", *arguments])
    results_file: dict[str, Any] = json.loads((out / "results.json").read_text())
    return code, results_file


def test_a_run_measures_decode_and_every_cell(on_cpu: Any, tmp_path: Path) -> None:
    code, measured = run(tmp_path, "--formats", "all")
    assert (code, measured["refused"], measured["stopped"]) == (0, {}, False)
    assert [one["batch"] for one in measured["decode"]["cells"]] == [1, 4, 16]
    assert all(list(one["seconds"]) == [CUBLAS, "squeezellm-4", "squeezellm-3"] for one in measured["decode"]["cells"])
    assert [one["batch"] for one in measured["cells"]] == [1, 16]
    assert all(list(one["seconds"]) == [CUBLAS, *formats.ABOUT] for one in measured["cells"])
    assert measured["cells"][0]["bytes"][CUBLAS] == 2 * TINY.n * TINY.k
    assert len(measured["errors"]) == 3 * (1 + len(formats.ABOUT))
    assert all(0 < error["error"] < 0.01 for error in measured["errors"])
    assert "### Decode loop" in (tmp_path / "table.md").read_text()


def test_one_part_can_be_left_out(on_cpu: Any, tmp_path: Path) -> None:
    _, measured = run(tmp_path, "--parts", "kernels")
    assert measured["decode"] is None
    assert len(measured["cells"]) == 2
    _, measured = run(tmp_path, "--parts", "decode", "--context", "3")
    assert measured["decode"]["context"] == 3
    assert measured["cells"] == []


def test_a_contender_that_fails_does_not_take_the_others_along(
    on_cpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from benchmarks.gpu import weights

    def broken(n: int, k: int, device: str) -> Any:
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(weights.MAKERS, "squeezellm-3", broken)
    code, measured = run(tmp_path)
    assert code == 0
    assert measured["refused"] == {
        "decode loop: squeezellm-3": "RuntimeError: no kernel image",
        f"{TINY}: squeezellm-3": "RuntimeError: no kernel image",
    }
    assert list(measured["cells"][0]["seconds"]) == [CUBLAS, "squeezellm-4", "squeezellm-4-sparse"]


def test_a_device_that_fails_ends_the_run_with_what_there_is(
    on_cpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(on_cpu, "times", fail)
    code, measured = run(tmp_path)
    assert code == 0
    assert set(measured["refused"]) == {"the rest of the decode loop", "the rest of the linears"}
    assert "an illegal memory access" in (tmp_path / "table.md").read_text()


def test_a_wrong_product_is_an_error(
    on_cpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.gpu import linears

    multiply = linears.multiply
    monkeypatch.setattr(linears, "multiply", lambda x, weight: multiply(x, weight) * 1.02)
    code, measured = run(tmp_path, "--parts", "kernels")
    assert code == 1
    assert "cuBLAS bf16, 7b o 64x256, batch 1: the product is 2." in capsys.readouterr().err
    assert measured["errors"][0]["error"] > 0.01


def test_a_run_ends_when_its_time_is_over(on_cpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.gpu import state

    clock = iter([*[0.0] * 7, *[2e9] * 9])  # three variants, three batches, the first linear
    monkeypatch.setattr(state, "time", SimpleNamespace(monotonic=lambda: next(clock, 2e9)))
    code, measured = run(tmp_path)
    assert (code, measured["stopped"]) == (0, True)
    assert len(measured["decode"]["cells"]) == 3
    assert measured["cells"] == []
    assert "**Not complete:**" in (tmp_path / "table.md").read_text()


def test_a_step_of_a_packed_model_is_that_of_its_dense_one(on_cpu: Any) -> None:
    import torch

    from benchmarks.gpu import decode, weights

    model = decode.LLAMA_7B
    shared = decode.make_shared(model, "cpu")
    first = {shape.layer: weights.make("squeezellm-4", shape, "cpu") for shape in model.linears}
    ends = []
    for layer in (
        {name: w for name, (w, _) in first.items()},
        {name: d().bfloat16() for name, (_, d) in first.items()},
    ):
        tokens = torch.tensor([1, 2, 3])
        caches = decode.make_caches(model, 3, 5, "cpu")
        decode.step(model, shared, [layer] * model.layers, caches, tokens)
        ends.append((tokens, caches[-1]))
    assert torch.equal(ends[0][1][:, :, :, :-1], ends[1][1][:, :, :, :-1])
    written = [cache[:, :, :, -1].float() for _, cache in ends]
    assert float((written[0] - written[1]).norm() / written[1].norm()) < 0.03


# --- the real device module, with CUDA's own part replaced


def test_times_divide_by_calls_and_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from benchmarks.gpu import device

    clock = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, later: Event) -> float:
            return later.at - self.at

    def replay(milliseconds: float, calls: int) -> device.Replay:
        def started() -> None:
            clock[0] += milliseconds

        return device.Replay(started, [started] * calls)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    taken = device.times({"a": replay(8.0, 4), "b": replay(3.0, 1)}, rounds=3, repeats=2)
    assert taken == {"a": [pytest.approx(2e-3)] * 3, "b": [pytest.approx(3e-3)] * 3}
    assert clock[0] == 11.0 * (1 + 3 * 2)


def test_a_graph_is_captured_after_one_call_and_keeps_what_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from benchmarks.gpu import device

    done: list[str] = []

    class Graph:
        def replay(self) -> None:
            done.append("replay")

    @contextlib.contextmanager
    def graph(_: Graph, stream: str) -> Any:
        assert stream == "ours"
        done.append("capture")
        yield
        done.append("captured")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "ours")
    calls = [lambda: done.append("one"), lambda: done.append("two")]
    made = device.capture(calls)
    made.run()
    assert done == ["one", "capture", "one", "two", "captured", "replay"]
    assert made.calls is calls


def test_the_time_is_that_of_the_machine() -> None:
    from benchmarks.gpu.state import OutOfTimeError, State

    State(Path("x"), {}, time.monotonic() + 60).check_time()
    with pytest.raises(OutOfTimeError):
        State(Path("x"), {}, time.monotonic()).check_time()
