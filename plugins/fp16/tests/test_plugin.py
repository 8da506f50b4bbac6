"""The fp16 plugin: what it claims, what it finds, what it tells vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import LLAMA_7B, LLAMA_70B, REMOVE, make_llama
from helpers.composed import composed, errors, findings, text
from quantserve.target import Target, this_cpu
from quantserve_fp16 import plugin

GATE = "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize(("target", "ranks"), [("cpu", 1), ("a100-80g", 2), ("mi300x", 1)])
def test_good_checkpoints(tmp_path: Path, dtype: str, target: str, ranks: int) -> None:
    composition = composed(make_llama(tmp_path / "m", dtype=dtype, shards=2), target, ranks)
    assert composition.method is not None
    assert composition.method.name == "fp16"
    assert not errors(composition)
    assert "quantization" not in composition.engine_kwargs


@pytest.mark.parametrize("name", ["fp16", "none", "unquantized"])
def test_names(tmp_path: Path, name: str) -> None:
    composition = composed(make_llama(tmp_path / "m"), quantization=name)
    assert not errors(composition)
    assert "quantization" not in composition.engine_kwargs


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"drop": [f"{GATE}.weight"]}, "fp16-missing-tensors", f"{GATE}.weight"),
        ({"override": {f"{GATE}.weight": ("F16", (256, 512))}}, "fp16-wrong-shape", "[256, 512], expected [512, 256]"),
        ({"override": {f"{GATE}.weight": ("F8_E4M3", (512, 256))}}, "fp16-wrong-dtype", f"{GATE}.weight F8_E4M3"),
        ({"extra": {f"{GATE}.scale": ("F16", (512,))}}, "fp16-unexpected-tensors", f"{GATE}.scale [512]"),
        ({"config": {"intermediate_size": 500}}, "fp16-wrong-shape", "expected [500, 256]"),
        (
            {"method": "awq", "config": {"quantization_config": REMOVE}},
            "fp16-quantized-tensors",
            "model.layers.0.mlp.down_proj.qweight",
        ),
        ({"method": "squeezellm", "config": {"quantization_config": REMOVE}}, "fp16-quantized-tensors", "lookup_table"),
        ({"method": "awq"}, "method-mismatch", "'awq'"),
    ],
)
def test_bad_checkpoints(tmp_path: Path, options: dict[str, Any], code: str, words: str) -> None:
    found = errors(composed(make_llama(tmp_path / "m", **options), quantization="fp16"))
    assert words in text(found[code])
    assert found[code].fix


@pytest.mark.parametrize("method", ["awq", "squeezellm"])
@pytest.mark.parametrize("declared", [True, False])
def test_claims_nothing_quantized(tmp_path: Path, method: str, declared: bool) -> None:
    folder = make_llama(tmp_path / "m", method, config={} if declared else {"quantization_config": REMOVE})
    composition = composed(folder)
    assert composition.method is not None
    assert composition.method.name == method


def cpu_with(*features: str) -> Target:
    cpu = this_cpu()
    return Target("cpu", "cpu", cpu.memory_bytes, count=1, cores=2, features=features)


@pytest.mark.parametrize(
    ("dtype", "features", "kwargs"),
    [
        ("F16", ("avx512f", "avx512_bf16"), {"dtype": "bfloat16"}),
        ("F16", ("avx512f",), {}),
        ("BF16", ("avx512f", "avx512_bf16"), {}),
        ("F32", ("avx512f", "avx512_bf16"), {}),
    ],
)
def test_float16_is_not_emulated(
    tmp_path: Path, dtype: str, features: tuple[str, ...], kwargs: dict[str, object]
) -> None:
    composition = composed(make_llama(tmp_path / "m", dtype=dtype))
    target = cpu_with(*features)
    assert plugin.quantserve_engine_kwargs(composition.checkpoint, composition.model, target) == kwargs
    said = list(plugin.quantserve_validate(composition.checkpoint, composition.model, target))
    assert [finding.code for finding in said] == (["fp16-dtype"] if kwargs else [])


def test_the_users_dtype_wins(tmp_path: Path) -> None:
    composition = composed(make_llama(tmp_path / "m"), "cpu", dtype="float16")
    assert composition.engine_kwargs["dtype"].value == "float16"
    assert composition.engine_kwargs["dtype"].source == "config"
    assert "fp16-dtype" not in findings(composition)


@pytest.mark.parametrize(
    ("shape", "target", "ranks", "ttft"),
    [(LLAMA_7B, "a100-80g", 1, 362), (LLAMA_70B, "a100-80g", 4, 1073), (LLAMA_7B, "h100", 1, None)],
)
def test_published_performance(tmp_path: Path, shape: dict[str, Any], target: str, ranks: int, ttft: float) -> None:
    expected = composed(make_llama(tmp_path / "m", **shape), target, ranks).expected
    assert expected is not None
    assert (expected.ttft_ms if expected.source == "reference" else None) == ttft


def test_llama_3_is_not_llama_2(tmp_path: Path) -> None:
    shape = {**LLAMA_7B, "intermediate": 14336, "vocab": 128256, "kv_heads": 8}
    expected = composed(make_llama(tmp_path / "m", **shape), "a100-80g").expected
    assert expected is not None
    assert expected.source == "roofline"
