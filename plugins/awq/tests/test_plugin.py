"""What the AWQ plugin finds in good and bad checkpoints, and the arguments it gives to vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import quantserve_kernels
from helpers.checkpoints import LLAMA_7B, LLAMA_70B, REMOVE, make_llama
from helpers.composed import composed, errors, findings, text
from quantserve.api import DISABLED_KERNELS, OUR_KERNEL, VLLM_KERNEL, Target
from quantserve.planning.plan import make_plan
from quantserve.predict import cpu_kernels
from quantserve_awq import plugin
from quantserve_kernels import Status

CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
Q = "model.layers.1.self_attn.q_proj"
K = "model.layers.1.self_attn.k_proj"
O = "model.layers.1.self_attn.o_proj"  # noqa: E741
DOWN = "model.layers.1.mlp.down_proj"


def config(**changes: object) -> dict[str, Any]:
    """quantization_config with changed keys; None removes one."""
    values = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    return {"quantization_config": values}


# --- good checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "target", "ranks"),
    [
        ({}, "a100-80g", 1),
        ({}, "cpu", 2),
        ({"group_size": 64}, "h100", 2),
        ({"group_size": 32, "shards": 3}, "cpu", 2),
        ({"group_size": -1}, "a100-80g", 1),
        ({"group_size": -1}, "cpu", 1),
        ({"dtype": "BF16"}, "a100-80g", 1),
        ({"tie_word_embeddings": True, "bias": ("q_proj", "k_proj", "v_proj", "o_proj")}, "cpu", 1),
        ({"hidden": 512, "heads": 4, "kv_heads": 1, "intermediate": 1024}, "t4", 4),
        ({"head_dim": 128, "hidden": 384, "heads": 4, "kv_heads": 2, "intermediate": 768}, "cpu", 2),
        (LLAMA_7B, "a10g", 1),
        (LLAMA_70B, "a100-80g", 4),
    ],
)
def test_good_checkpoints_have_no_errors(tmp_path: Path, options: dict[str, Any], target: str, ranks: int) -> None:
    composition = composed(make_llama(tmp_path / "m", "awq", **options), target, ranks)
    assert composition.method is not None
    assert composition.method.name == "awq"
    assert not errors(composition)


def test_old_spelling_beside_the_model(tmp_path: Path) -> None:
    old = {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}
    folder = make_llama(
        tmp_path / "m",
        "awq",
        group_size=64,
        config={"quantization_config": REMOVE},
        quant_files={"quant_config.json": old},
    )
    composition = composed(folder, "cpu")
    assert not errors(composition)
    assert composition.engine_kwargs["quantization"].value == "awq"


def test_unquantized_whole_groups_are_fine(tmp_path: Path) -> None:
    parts = ("qweight", "qzeros", "scales")
    names = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")]
    folder = make_llama(
        tmp_path / "m",
        "awq",
        drop=[f"{name}.{part}" for name in names for part in parts],
        extra={f"{name}.weight": ("F16", (512, 256)) for name in names},
    )
    assert not errors(composed(folder, "cpu"))


@pytest.mark.parametrize("name", ["awq", "AWQ", "auto_awq", "awq_marlin"])
@pytest.mark.parametrize("target", ["cpu", "a100-80g", "mi300x"])
def test_every_name_becomes_the_one_the_platform_takes(tmp_path: Path, name: str, target: str) -> None:
    composition = composed(make_llama(tmp_path / "m", "awq"), target, quantization=name)
    assert not errors(composition)
    assert composition.engine_kwargs["quantization"].value == "awq"


# --- bad configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["gemm", "GEMM", "exllama", "exllamav2", "ipex"])
def test_versions_that_name_a_kernel_for_the_gemm_layout(tmp_path: Path, version: str) -> None:
    assert not errors(composed(make_llama(tmp_path / "m", "awq", config=config(version=version))))


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"bits": 8}, "awq-bits", "8 bits"),
        ({"bits": None}, "awq-missing-keys", "bits or w_bit"),
        ({"group_size": None}, "awq-missing-keys", "group_size or q_group_size"),
        ({"zero_point": None}, "awq-missing-keys", "zero_point"),
        ({"group_size": 0}, "awq-bad-keys", "group_size is '0'"),
        ({"group_size": "128"}, "awq-bad-keys", "group_size is '128'"),
        ({"bits": "four"}, "awq-bad-keys", "bits is 'four'"),
        ({"zero_point": 1}, "awq-bad-keys", "zero_point is '1'"),
        ({"version": "gemv_fast"}, "awq-version", "version gemv_fast"),
        ({"group_size": 64}, "awq-group-size", "group_size 64, the scales are of groups of 128"),
        ({"group_size": -1}, "awq-group-size", "group_size -1"),
        ({"quant_method": "gptq"}, "method-mismatch", "'gptq'"),
        ({"quant_method": "compressed-tensors"}, "method-mismatch", "'compressed-tensors'"),
        ({"quant_method": None}, "quant-method-missing", "quant_method"),
    ],
)
def test_bad_settings(tmp_path: Path, changes: dict[str, object], code: str, words: str) -> None:
    folder = make_llama(tmp_path / "m", "awq", config=config(**changes))
    found = errors(composed(folder, quantization="awq"))
    assert list(found) == [code]
    assert words in text(found[code])
    assert found[code].fix


def test_no_settings_anywhere(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", "awq", config={"quantization_config": REMOVE})
    assert list(errors(composed(folder))) == ["quant-config-missing"]


def test_settings_in_two_files(tmp_path: Path) -> None:
    folder = make_llama(
        tmp_path / "m",
        "awq",
        config={"quantization_config": REMOVE},
        quant_files={"quant_config.json": CONFIG, "quantize_config.json": CONFIG},
    )
    assert list(errors(composed(folder))) == ["quant-config-ambiguous"]


def test_user_supplies_the_settings(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", "awq", config={"quantization_config": REMOVE})
    assert not errors(composed(folder, hf_overrides={"quantization_config": CONFIG}))
    wrong = {"quantization_config": {**CONFIG, "group_size": 64}}
    found = errors(composed(folder, hf_overrides=wrong))
    assert "hf_overrides says group_size 64" in found["awq-group-size"].message


def test_awq_asked_of_an_unquantized_model(tmp_path: Path) -> None:
    found = errors(composed(make_llama(tmp_path / "m"), quantization="awq"))
    assert list(found) == ["awq-not-quantized"]
    declared = errors(composed(make_llama(tmp_path / "n", config=config())))
    assert "config.json says the model is quantized" in declared["awq-not-quantized"].message


# --- bad tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"drop": [f"{Q}.qzeros"]}, "awq-missing-tensors", f"{Q}.qzeros"),
        ({"drop": [f"{DOWN}.{part}" for part in ("qweight", "qzeros", "scales")]}, "awq-missing-tensors", f"{DOWN}.qw"),
        (
            {"override": {f"{Q}.scales": ("F16", (2, 248))}},
            "awq-wrong-shape",
            f"{Q}.scales [2, 248], expected [2, 256]",
        ),
        ({"override": {f"{Q}.qzeros": ("I32", (4, 32))}}, "awq-wrong-shape", "[4, 32], expected [2, 32]"),
        ({"override": {f"{Q}.scales": ("F32", (2, 256))}}, "awq-wrong-dtype", f"{Q}.scales F32"),
        ({"override": {f"{Q}.qweight": ("I64", (256, 32))}}, "awq-wrong-dtype", f"{Q}.qweight I64"),
        ({"extra": {f"{Q}.g_idx": ("I32", (256,))}}, "awq-unexpected-tensors", f"{Q}.g_idx [256]"),
        ({"config": {"intermediate_size": 1024}}, "awq-wrong-shape", "up_proj.qweight [256, 64], expected [256, 128]"),
        (
            {
                "drop": [f"{K}.{part}" for part in ("qweight", "qzeros", "scales")],
                "extra": {f"{K}.weight": ("F16", (128, 256))},
            },
            "awq-partly-quantized",
            "k_proj unquantized",
        ),
        ({"config": config(modules_to_not_convert=["mlp.gate"])}, "awq-skip-list", "gate_proj"),
        ({"extra": {"lm_head.qweight": ("I32", (256, 64))}}, "awq-lm-head", "lm_head.qweight"),
    ],
)
def test_bad_tensors(tmp_path: Path, options: dict[str, Any], code: str, words: str) -> None:
    found = errors(composed(make_llama(tmp_path / "m", "awq", **options)))
    assert code in found
    assert words in text(found[code])


def test_many_offenders_are_counted(tmp_path: Path) -> None:
    drop = [f"model.layers.{i}.self_attn.{p}_proj.scales" for i in range(8) for p in "qkv"]
    found = errors(composed(make_llama(tmp_path / "m", "awq", layers=8, drop=drop)))
    assert found["awq-missing-tensors"].message.startswith("24 tensors are missing")
    assert found["awq-missing-tensors"].offenders[-1] == "and 16 more"


# Tensors of one 256 x 256 linear in other layouts: dtype and shape of qweight, qzeros, scales.
LAYOUTS = {
    "gemv": (("I32", (256, 32)), ("I32", (256, 1)), ("F16", (256, 8))),
    "gemv_fast": (("I16", (64, 256)), ("F16", (8, 256)), ("F16", (8, 256))),
    "marlin": (("I32", (16, 512)), None, ("F16", (2, 256))),
    "GPTQ": (("I32", (32, 256)), ("I32", (2, 32)), ("F16", (2, 256))),
}


@pytest.mark.parametrize(
    ("kind", "code"),
    [("gemv", "awq-version"), ("gemv_fast", "awq-version"), ("marlin", "awq-version"), ("GPTQ", "awq-wrong-method")],
)
def test_other_layouts_even_when_square(tmp_path: Path, kind: str, code: str) -> None:
    qweight, qzeros, scales = LAYOUTS[kind]
    override = {f"{O}.qweight": qweight, f"{O}.scales": scales}
    drop = []
    if qzeros:
        override[f"{O}.qzeros"] = qzeros
    else:
        drop = [f"{O}.qzeros"]
    found = errors(composed(make_llama(tmp_path / "m", "awq", override=override, drop=drop)))
    assert list(found) == [code]
    assert kind in found[code].message
    assert O in found[code].offenders


def test_compressed_tensors_layout(tmp_path: Path) -> None:
    extra = {f"{O}.weight_packed": ("I32", (256, 32)), f"{O}.weight_scale": ("BF16", (256, 2))}
    drop = [f"{O}.{part}" for part in ("qweight", "qzeros", "scales")]
    found = errors(composed(make_llama(tmp_path / "m", "awq", extra=extra, drop=drop)))
    assert "compressed-tensors" in found["awq-wrong-method"].message


def test_shapes_that_cannot_be_packed(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", "awq", intermediate=500, group_size=128)
    found = errors(composed(folder))
    assert "down_proj: K 500 is not a multiple of 128" in text(found["awq-packing"])
    assert "N 500 is not a multiple of 8" in text(found["awq-packing"])


# --- ranks and devices --------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cpu", "a100-80g"])
def test_group_that_splits_ranks(tmp_path: Path, target: str) -> None:
    folder = make_llama(tmp_path / "m", "awq", intermediate=384)
    assert not errors(composed(folder, target, 1))
    finding = errors(composed(folder, target, 2))["awq-group-splits-ranks"]
    assert "model.layers.0.mlp.down_proj: K 384/2 = 192 is not a multiple of 128" in text(finding)
    assert "to 1" in finding.fix
    assert "wrong tokens" in finding.message


def test_qwen_72b_width_names_the_ranks_that_work(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", "awq", intermediate=29568, hidden=1024, heads=8, kv_heads=8)
    assert "K 29568/2 = 14784" in text(errors(composed(folder, ranks=2))["awq-group-splits-ranks"])


def test_one_group_per_row_cannot_be_split(tmp_path: Path) -> None:
    finding = errors(composed(make_llama(tmp_path / "m", "awq", group_size=-1), ranks=2))["awq-group-splits-ranks"]
    assert "group_size -1" in finding.message
    assert "model.layers.0.self_attn.o_proj" in finding.offenders


def test_word_that_splits_ranks(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", "awq", intermediate=264, group_size=8, hidden=256)
    found = errors(composed(folder, "a100-80g", 2))
    assert "gate_proj: N 264/2 = 132 is not a multiple of 8" in text(found["awq-word-splits-ranks"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"intermediate": 48, "group_size": 16}, "down_proj: K 48 is not a multiple of 32"),
        ({"hidden": 256, "heads": 8, "kv_heads": 1, "head_dim": 24, "group_size": 32}, "qkv_proj: N 240 per rank"),
    ],
)
def test_cpu_alignment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str) -> None:
    folder = make_llama(tmp_path / "m", "awq", **options)
    assert "awq-cpu-alignment" not in errors(composed(folder, "cpu"))
    monkeypatch.setenv(DISABLED_KERNELS, OUR_KERNEL)
    assert words in text(errors(composed(folder, "cpu"))["awq-cpu-alignment"])


def test_odd_group_on_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_llama(tmp_path / "m", "awq", hidden=224, heads=7, kv_heads=7, intermediate=448, group_size=7)
    assert "awq-cpu-group-size" not in errors(composed(folder, "cpu"))
    monkeypatch.setenv(DISABLED_KERNELS, OUR_KERNEL)
    assert "group_size 7 is odd" in errors(composed(folder, "cpu"))["awq-cpu-group-size"].message


def test_group_size_of_the_plain_kernel(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", "awq", hidden=512, intermediate=1024, group_size=256, dtype="BF16")
    composition = composed(folder, "a100-80g")
    assert not errors(composition)
    assert "much slower" in findings(composition)["awq-plain-kernel"].message
    assert composition.engine_kwargs["dtype"].value == "float16"
    bf16 = errors(composed(folder, "a100-80g", dtype="bfloat16"))
    assert list(bf16) == ["awq-plain-kernel-dtype"]
    assert list(errors(composed(folder, "mi300x"))) == ["awq-rocm-group-size"]
    assert not findings(composed(folder, "cpu")).keys() & {"awq-plain-kernel", "awq-rocm-group-size"}


def test_shapes_the_plain_kernel_cannot_take(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", "awq", hidden=512, heads=8, kv_heads=1, intermediate=1024, group_size=256)
    found = errors(composed(folder, "a100-80g"))["awq-plain-kernel-shape"]
    assert "qkv_proj: N 640 per rank is not a multiple of 256" in text(found)
    small = make_llama(tmp_path / "n", "awq", group_size=16)
    assert "not a multiple of 32" in text(errors(composed(small, "a100-80g"))["awq-plain-kernel-shape"])


def test_capability_and_dtype_gates(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", "awq")
    assert "needs compute capability 7.5" in errors(composed(folder, "v100"))["capability-too-low"].message
    assert "float16 or bfloat16" in errors(composed(folder, dtype="float32"))["dtype-unsupported"].message


# --- arguments and promises ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "target", "served"),
    [("BF16", "cpu", None), ("BF16", "a100-80g", None), ("BF16", "t4", None), ("F32", "a100-80g", None)],
)
def test_vllms_own_dtype_is_left_to_vllm(tmp_path: Path, dtype: str, target: str, served: str | None) -> None:
    composition = composed(make_llama(tmp_path / "m", "awq", dtype=dtype), target)
    assert not errors(composition)
    assert composition.engine_kwargs.get("dtype") == served
    json.dumps({key: setting.value for key, setting in composition.engine_kwargs.items()}, allow_nan=False)


def cpu(*features: str) -> Target:
    """A CPU with these instruction sets."""
    return Target("cpu", "cpu", 2**34, count=1, cores=2, features=features)


@pytest.mark.parametrize(("feature", "served"), [("avx512_bf16", "bfloat16"), ("avx512f", None)])
def test_float16_activations_are_not_emulated(tmp_path: Path, feature: str, served: str | None) -> None:
    composition = composed(make_llama(tmp_path / "m", "awq"))
    arguments = composition.checkpoint, composition.model, cpu(feature)
    assert plugin.quantserve_engine_kwargs(*arguments).get("dtype") == served
    said = {finding.code for finding in plugin.quantserve_validate(*arguments)}
    assert ("awq-dtype" in said) == (served == "bfloat16")


@pytest.mark.parametrize("dtype", ["auto", "half"])
def test_the_users_dtype_stays(tmp_path: Path, dtype: str) -> None:
    composition = composed(make_llama(tmp_path / "m", "awq"), dtype=dtype)
    arguments = composition.checkpoint, composition.model, cpu("avx512_bf16")
    assert "dtype" not in plugin.quantserve_engine_kwargs(*arguments)
    assert "awq-dtype" not in {finding.code for finding in plugin.quantserve_validate(*arguments)}


@pytest.mark.parametrize(
    ("left_out", "target", "name"),
    [
        (None, "a100-80g", "Marlin (vLLM)"),
        (OUR_KERNEL, "a100-80g", "Marlin (vLLM)"),
        (OUR_KERNEL, "cpu", "vLLM's AWQ for CPUs"),
        (VLLM_KERNEL, "cpu", "quantserve-kernels"),
    ],
)
def test_the_kernel_of_a_cpu_can_be_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_out: str | None, target: str, name: str
) -> None:
    if left_out:
        monkeypatch.setenv(DISABLED_KERNELS, left_out)
    composition = composed(make_llama(tmp_path / "m", "awq"), target)
    assert not errors(composition)
    assert composition.engine_environment["QUANTSERVE_ENGINE_PLUGINS"] == "quantserve-awq:awq"
    plan = make_plan(composition)
    assert plan.kernel.startswith(name)
    assert plan.runtime_env["env_vars"].get(DISABLED_KERNELS) == (left_out if target == "cpu" else None)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "quantserve-kernels is not installed"),
        (Status(False, "torch", "no compiler: g++"), "not compiled here (no compiler: g++)"),
    ],
)
def test_without_compiled_kernels_vllms_own_is_used_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Status | None, words: str
) -> None:
    if found is None:
        monkeypatch.setattr(cpu_kernels, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(quantserve_kernels, "status", lambda: found)
    composition = composed(make_llama(tmp_path / "m", "awq"))
    arguments = composition.checkpoint, composition.model, cpu()
    assert plugin.quantserve_environment(*arguments) == {}
    said = {finding.code: finding for finding in plugin.quantserve_validate(*arguments)}
    assert words in said["awq-slow-kernel"].message
    assert not {"awq-slow-kernel"} & findings(composition).keys()  # a GPU does not care


@pytest.mark.parametrize(
    ("shape", "target", "ranks", "throughput"),
    [
        (LLAMA_7B, "a100-80g", 1, 47.09),
        (LLAMA_70B, "a100-80g", 4, 14.4),
        (LLAMA_70B, "a100-80g", 1, None),
        (LLAMA_7B, "a100-40g", 1, None),
        (LLAMA_7B, "cpu", 1, None),
        ({}, "a100-80g", 1, None),
    ],
)
def test_published_performance(
    tmp_path: Path, shape: dict[str, Any], target: str, ranks: int, throughput: float | None
) -> None:
    expected = composed(make_llama(tmp_path / "m", "awq", **shape), target, ranks).expected
    assert expected is not None
    assert expected.source == ("reference" if throughput else "roofline")
    if throughput:
        assert expected.output_tokens_per_s == throughput
        assert "vLLM 0.2.2" in expected.conditions
        assert any("per user" in caveat for caveat in expected.caveats)
