"""What vLLM serves by itself: detection, settings, devices, arguments."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import make_llama
from quantserve.cli.main import run
from quantserve.config import model_from_source
from quantserve.families import quantization_methods
from quantserve.planning.compose import Composition, compose
from quantserve.plugins.registry import Registry
from quantserve.target import Target, find_target
from quantserve_vllm.methods import METHODS

Check = Callable[..., Composition]
H100 = "h100"
EPYC = Target("epyc", "cpu", 64 << 30, cores=8, features=("avx2", "avx512f", "avx512_bf16"))

AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "data_type": "int",
              "packing_format": "auto_round:auto_gptq", "autoround_version": "0.13"}  # fmt: skip
INT8 = {"dtype": "int8", "qscheme": "per_channel", "symmetric": True, "is_dynamic": False}
FP8 = {**INT8, "dtype": "fp8_e4m3"}
QUARK = {"quant_method": "quark", "export": {"kv_cache_group": [], "pack_method": "reorder"}, "exclude": ["lm_head"],
         "layer_type_quant_config": {}, "layer_quant_config": {},
         "global_quant_config": {"weight": INT8, "input_tensors": {**INT8, "is_dynamic": True}}}  # fmt: skip
TORCHAO = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
FP_QUANT = {"quant_method": "fp_quant", "hadamard_group_size": 32, "forward_dtype": "mxfp4",
            "forward_method": "abs_max", "modules_to_not_convert": []}  # fmt: skip


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Compose a small model with this quantization config."""

    def build(config: dict[str, Any] | None, target: Target | str = H100, **engine_kwargs: object) -> Composition:
        changed = {"quantization_config": config} if config else {}
        folder = make_llama(tmp_path / "model", dtype="BF16", config=changed)
        model = model_from_source(str(folder))
        engine = model.engine_config.model_copy(update={"engine_kwargs": engine_kwargs})
        model = model.model_copy(update={"engine_config": engine})
        return compose(model, Registry.load({}), find_target(target) if isinstance(target, str) else target)

    return build


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


def codes(composed: Composition) -> list[str]:
    return [error.code for error in composed.errors]


@pytest.mark.parametrize("config", [AUTO_ROUND, QUARK, TORCHAO, FBGEMM], ids=lambda config: config["quant_method"])
def test_declared_files_are_served_on_gpus(check: Check, config: dict[str, Any]) -> None:
    composed = check(config)
    assert composed.method is not None
    assert composed.method.name == "vllm"
    assert codes(composed) == []
    assert "quantization" not in composed.engine_kwargs  # vLLM reads config.json itself


@pytest.mark.parametrize(
    ("config", "where", "said"),
    [
        (without(AUTO_ROUND, "bits"), "bits", "is missing"),
        ({**AUTO_ROUND, "bits": 9}, "bits", "is 9"),
        ({**AUTO_ROUND, "packing_format": "auto_round:gptqmodel"}, "packing_format", "auto_round:auto_awq"),
        ({**AUTO_ROUND, "data_type": "nv_fp"}, "data_type", "nv_fp"),
        ({**AUTO_ROUND, "data_type": "mx_fp", "group_size": 16, "packing_format": "auto_round:llm_compressor"},
         "group_size", "is 16"),
        ({**AUTO_ROUND, "data_type": "fp", "bits": 8, "packing_format": "auto_round:fp8"}, "group_size", "128"),
        ({**AUTO_ROUND, "backend": "exllamav2"}, "backend", "exllamav2"),
        ({**AUTO_ROUND, "quant_method": "intel/auto-round"}, "quant_method", "does not know"),
        (without(QUARK, "export"), "export", "is missing"),
        ({**QUARK, "export": {"kv_cache_group": ["*k_proj"]}}, "layer_quant_config", "KV cache"),
        ({**QUARK, "exclude": None}, "exclude", "no list"),
        ({**QUARK, "global_quant_config": {"weight": {"dtype": "int4", "group_size": 32}}},
         "global_quant_config.weight.symmetric", "missing"),
        ({**TORCHAO, "quant_type": "int4_weight_only"}, "quant_type", "no object"),
        ({**TORCHAO, "quant_type": {"default": {"_type": "A"}, "other": {}}}, "quant_type", "default, other"),
        (without(FBGEMM, "activation_scale_ub"), "activation_scale_ub", "is missing"),
        ({**FP_QUANT, "forward_dtype": "mxfp8"}, "forward_dtype", "mxfp8"),
    ],
)  # fmt: skip
def test_settings_that_vllm_refuses(check: Check, config: dict[str, Any], where: str, said: str) -> None:
    target = "b200" if config["quant_method"] == "fp_quant" else H100
    found = [error for error in check(config, target).errors if error.code == "vllm-settings"]
    assert [error.offenders for error in found] == [(f"quantization_config.{where}",)]
    assert said in found[0].message


@pytest.mark.parametrize(
    ("config", "target", "expected"),
    [
        (FP_QUANT, H100, "vllm-device"),
        (FBGEMM, EPYC, "vllm-device"),
        (TORCHAO, EPYC, ""),
        (AUTO_ROUND, EPYC, ""),
        ({**AUTO_ROUND, "sym": False}, EPYC, "vllm-cpu"),
        ({**AUTO_ROUND, "sym": False}, H100, ""),
        ({**AUTO_ROUND, "sym": False, "packing_format": "auto_round:auto_awq"}, EPYC, ""),
        ({**AUTO_ROUND, "bits": 8}, EPYC, "vllm-cpu"),
        (QUARK, EPYC, ""),
        ({**QUARK, "global_quant_config": {"weight": FP8, "input_tensors": FP8}}, EPYC, "vllm-cpu"),
        ({**QUARK, "global_quant_config": {"weight": {"dtype": "fp4"}}}, EPYC, "vllm-cpu"),
    ],
)
def test_devices(
    check: Check, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], target: Target | str, expected: str
) -> None:
    monkeypatch.setattr("quantserve_vllm.plugin.find_spec", lambda name: None)  # a machine without an engine
    assert codes(check(config, target)) == ([expected] if expected else [])


def test_online_quantization_of_16_bit_files(check: Check) -> None:
    composed = check(None, quantization="fp8_per_channel")
    assert codes(composed) == []
    assert composed.engine_kwargs["quantization"].value == "fp8_per_channel"
    plain = check(None)
    assert composed.memory is not None
    assert plain.memory is not None
    assert composed.memory.weights_bytes < plain.memory.weights_bytes


def test_online_quantization_is_not_detected(check: Check) -> None:
    composed = check(None)
    assert composed.method is not None
    assert composed.method.name == "fp16"


@pytest.mark.parametrize(
    ("config", "kwargs", "expected"),
    [
        (QUARK, {"quantization": "fp8_per_tensor"}, "vllm-already-quantized"),
        (None, {"quantization": "quark"}, "vllm-not-declared"),
        (None, {"quantization": "vllm"}, "vllm-not-declared"),
        (None, {"quantization": "online"}, "vllm-online-settings"),
        (None, {"quantization": "online", "quantization_config": {"linear": "fp8_per_channel"}}, ""),
    ],
)
def test_what_the_user_names_fits_the_files(
    check: Check, config: dict[str, Any] | None, kwargs: dict[str, object], expected: str
) -> None:
    assert codes(check(config, **kwargs)) == ([expected] if expected else [])


def test_experts_only_methods_do_nothing_to_a_dense_model(check: Check) -> None:
    found = check(None, quantization="int8_per_channel_weight_only").findings
    assert "vllm-no-experts" in [finding.code for finding in found]


def test_a_deprecated_method_is_allowed_with_a_warning(check: Check) -> None:
    composed = check(FBGEMM)
    assert composed.engine_kwargs["allow_deprecated_quantization"].value is True
    assert "vllm-deprecated" in [finding.code for finding in composed.findings]


def test_auto_round_is_inc_for_vllm(check: Check) -> None:
    assert check(AUTO_ROUND, quantization="auto-round").engine_kwargs["quantization"].value == "inc"


def test_recommend_says_once_that_it_predicts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_llama(tmp_path / "model", dtype="BF16")
    assert run(["recommend", str(folder), "--target", "l40s", "--method", "fp16", "--method", "vllm"]) == 0
    assert capsys.readouterr().out.count("its plugin describes no kernel") == 1


def test_every_argument_is_vllms_own() -> None:
    assert METHODS.keys() <= quantization_methods()


def test_the_light_module_stays_light() -> None:
    code = "import quantserve_vllm.plugin, sys; print([m for m in ('torch', 'vllm', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
