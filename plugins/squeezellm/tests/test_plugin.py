"""What the SqueezeLLM plugin finds in good and bad checkpoints, and the arguments it gives to vLLM."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import quantserve_kernels
from helpers.checkpoints import LLAMA_7B, REMOVE, Spec, llama_tensors, make_llama, quantized_linear
from helpers.composed import composed, errors, findings, text
from quantserve.api import Target
from quantserve.checkpoint import Checkpoint
from quantserve.predict import codebook, cpu_kernels
from quantserve_squeezellm import plugin

Q = "model.layers.1.self_attn.q_proj"
K = "model.layers.1.self_attn.k_proj"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("options", "target", "ranks"),
    [
        ({}, "a100-80g", 1),
        ({"bits": 3}, "cpu", 2),
        ({"sparse": 0.0045, "full_rows": 10}, "cpu", 2),
        ({"sparse": 0.0005, "bits": 3, "shards": 3}, "v100", 2),
        ({"dtype": "BF16", "tie_word_embeddings": True}, "a100-80g", 4),
        ({"bias": ("q_proj", "k_proj", "v_proj", "o_proj")}, "cpu", 1),
        ({**LLAMA_7B, "dtype": "F32"}, "a10g", 1),
    ],
)
def test_good_checkpoints_have_no_errors(tmp_path: Path, options: dict[str, Any], target: str, ranks: int) -> None:
    composition = composed(make_llama(tmp_path / "m", "squeezellm", **options), target, ranks)
    assert composition.method is not None
    assert composition.method.name == "squeezellm"
    assert not errors(composition)
    assert composition.engine_kwargs["quantization"].value == "squeezellm"


@pytest.mark.parametrize("name", ["squeezellm", "SqueezeLLM", "sqllm", None])
def test_settings_beside_the_model(tmp_path: Path, name: str | None) -> None:
    folder = make_llama(
        tmp_path / "m",
        "squeezellm",
        config={"quantization_config": REMOVE},
        quant_files={"quant_config.json": {"wbits": 4}},
    )
    composition = composed(folder, "cpu", **({"quantization": name} if name else {}))
    assert not errors(composition)
    assert composition.engine_kwargs["quantization"].value == "squeezellm"


def test_start_rows_are_no_weights(tmp_path: Path) -> None:
    extra = {f"{Q}.startrows": ("I32", (128,))}
    assert not errors(composed(make_llama(tmp_path / "m", "squeezellm", sparse=0.001, extra=extra), "cpu"))


EXPERTS = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}"


def make_mixtral(path: Path, **changes: Spec | None) -> Path:
    """A mixture of four experts, all linears with a sparse part; `changes` by tensor replace or leave out."""
    plain = llama_tensors("squeezellm", sparse=0.01)
    mlp = [name for name in plain if ".mlp." in name]
    made: dict[str, Spec | None] = {
        f"model.layers.{i}.block_sparse_moe.gate.weight": ("F16", (4, 256)) for i in range(2)
    }
    options: Any = {"bits": 4, "group_size": 128, "dtype": "F16", "sparse": 0.01, "full_rows": 0}
    for layer, expert in product(range(2), range(4)):
        for leaf, (n, k) in {"w1": (512, 256), "w3": (512, 256), "w2": (256, 512)}.items():
            name = EXPERTS.format(layer=layer, expert=expert, leaf=leaf)
            made |= quantized_linear(name, n, k, "squeezellm", **options)
    kept = {name: spec for name, spec in {**made, **changes}.items() if spec is not None}
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
    return make_llama(path, "squeezellm", sparse=0.01, drop=mlp, extra=kept, config=config)


def test_experts_are_served_on_a_cpu_and_not_on_a_gpu(tmp_path: Path) -> None:
    folder = make_mixtral(tmp_path / "m")
    assert not errors(composed(folder, "cpu", 2))
    found = errors(composed(folder, "a100-80g"))
    assert list(found) == ["squeezellm-gpu-experts"]
    assert "experts of 2 layers" in text(found["squeezellm-gpu-experts"])


@pytest.mark.parametrize(
    ("suffix", "spec", "code", "words"),
    [
        ("lookup_table", None, "squeezellm-missing-tensors", "{}.lookup_table"),
        ("vals", None, "squeezellm-sparse", "{}: has rows, cols without vals"),
        ("rows", ("I32", (99,)), "squeezellm-sparse", "{}.rows [99], expected [257]"),
    ],
)
def test_a_damaged_expert_is_named(tmp_path: Path, suffix: str, spec: Spec | None, code: str, words: str) -> None:
    expert = EXPERTS.format(layer=1, expert=3, leaf="w2")
    found = errors(composed(make_mixtral(tmp_path / "m", **{f"{expert}.{suffix}": spec}), "cpu"))
    assert list(found) == [code]
    assert words.format(expert) in text(found[code])


SETTINGS = {"quant_method": "squeezellm"}


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({**SETTINGS, "wbits": 3}, "squeezellm-bits", "says wbits 3, but the lookup tables have 16 entries"),
        ({**SETTINGS, "wbits": 8}, "squeezellm-bits", "'8'; SqueezeLLM has 3 and 4"),
        ({**SETTINGS, "wbits": "4"}, "squeezellm-bits", "SqueezeLLM has 3 and 4"),
        (SETTINGS, "squeezellm-missing-wbits", 'add to it "wbits": 4'),
        ({"quant_method": "awq", "wbits": 4}, "method-mismatch", "'awq'"),
        ({"wbits": 4}, "quant-method-missing", "quant_method"),
    ],
)
def test_bad_settings(tmp_path: Path, settings: dict[str, object], code: str, words: str) -> None:
    folder = make_llama(tmp_path / "m", "squeezellm", config={"quantization_config": settings})
    found = errors(composed(folder, quantization="squeezellm"))
    assert list(found) == [code]
    assert words in text(found[code])


def test_no_settings_anywhere(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", "squeezellm", config={"quantization_config": REMOVE})
    found = errors(composed(folder))
    assert found.keys() == {"quant-config-missing", "squeezellm-missing-wbits"}
    assert not errors(composed(folder, hf_overrides={"quantization_config": {**SETTINGS, "wbits": 4}}))


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"drop": [f"{Q}.lookup_table"]}, "squeezellm-missing-tensors", f"{Q}.lookup_table"),
        ({"drop": [f"{DOWN}.qweight"]}, "squeezellm-missing-tensors", f"{DOWN}.qweight"),
        ({"override": {f"{Q}.qweight": ("I32", (24, 256))}}, "squeezellm-wrong-shape", "[24, 256], expected [32, 256]"),
        ({"override": {f"{Q}.qweight": ("I16", (32, 256))}}, "squeezellm-wrong-dtype", f"{Q}.qweight I16"),
        ({"override": {f"{Q}.lookup_table": ("F32", (256, 8))}}, "squeezellm-mixed-widths", "1 linears of 3 bits"),
        ({"extra": {f"{Q}.zeros": ("F16", (256,))}}, "squeezellm-unexpected-tensors", f"{Q}.zeros [256]"),
        ({"config": {"num_key_value_heads": 4}}, "squeezellm-wrong-shape", "k_proj.lookup_table [128, 16]"),
        (
            {"drop": [f"{K}.qweight", f"{K}.lookup_table"], "extra": {f"{K}.weight": ("F16", (128, 256))}},
            "squeezellm-partly-quantized",
            "k_proj unquantized",
        ),
        ({"sparse": 0.01, "drop": [f"{Q}.vals"]}, "squeezellm-sparse", f"{Q}: has rows, cols without vals"),
        ({"full_rows": 4, "drop": [f"{Q}.full_rows"]}, "squeezellm-sparse", "full_row_indices without full_rows"),
        (
            {"sparse": 0.01, "override": {f"{Q}.vals": ("F32", (9,))}},
            "squeezellm-sparse",
            "cols [655] and vals [9] differ",
        ),
        ({"sparse": 0.01, "override": {f"{Q}.rows": ("I32", (256,))}}, "squeezellm-sparse", "expected [257]"),
        (
            {"full_rows": 4, "override": {f"{Q}.full_row_indices": ("I32", (3,))}},
            "squeezellm-sparse",
            "full_rows [256, 4] needs as many full_row_indices as columns, found [3]",
        ),
        (
            {"config": {"quantization_config": {**SETTINGS, "wbits": 4, "sparse": {Q: {"nnz": 7, "full_rows": 0}}}}},
            "squeezellm-sparse",
            f"{Q}: config.json says nnz 7, the tensors have 0",
        ),
    ],
)
def test_bad_tensors(tmp_path: Path, options: dict[str, Any], code: str, words: str) -> None:
    found = errors(composed(make_llama(tmp_path / "m", "squeezellm", **options)))
    assert code in found
    assert words in text(found[code])
    assert found[code].fix


def test_tables_in_bfloat16_have_lost_bits(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", "squeezellm", override={f"{Q}.lookup_table": ("BF16", (256, 16))})
    composition = composed(folder)
    assert not errors(composition)
    assert findings(composition)["squeezellm-table-bfloat16"].offenders == (f"{Q}.lookup_table",)


@pytest.mark.parametrize(("bits", "width", "multiple"), [(4, 516, 8), (3, 520, 32)])
def test_k_that_does_not_fill_words(tmp_path: Path, bits: int, width: int, multiple: int) -> None:
    folder = make_llama(tmp_path / "m", "squeezellm", bits=bits, intermediate=width)
    words = f"down_proj: K {width} is not a multiple of {multiple}"
    assert words in text(errors(composed(folder))["squeezellm-packing"])


@pytest.mark.parametrize(("bits", "width", "multiple"), [(4, 288, 8), (3, 320, 32)])
def test_words_that_split_ranks(tmp_path: Path, bits: int, width: int, multiple: int) -> None:
    folder = make_llama(tmp_path / "m", "squeezellm", bits=bits, intermediate=width, heads=8, kv_heads=8)
    assert not errors(composed(folder))
    ranks = 8 if bits == 4 else 4
    found = errors(composed(folder, ranks=ranks))["squeezellm-word-splits-ranks"]
    assert f"K {width}/{ranks} = {width // ranks} is not a multiple of {multiple}" in text(found)


def test_linears_only_as_published_for_llama_1(tmp_path: Path) -> None:
    norms = [f"model.layers.{i}.{n}_layernorm.weight" for i in (0, 1) for n in ("input", "post_attention")]
    drop = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", *norms]
    found = errors(composed(make_llama(tmp_path / "m", "squeezellm", drop=drop)))
    assert "--base" in found["squeezellm-linears-only"].fix
    assert "model-tensors-missing" in found


def test_unquantized_model(tmp_path: Path) -> None:
    found = errors(composed(make_llama(tmp_path / "m"), quantization="squeezellm"))
    assert list(found) == ["squeezellm-not-quantized"]


def test_original_pickle_points_to_convert(tmp_path: Path) -> None:
    folder = make_llama(
        tmp_path / "m",
        "squeezellm",
        config={"quantization_config": REMOVE},
        quant_files={"quant_config.json": {"wbits": 4}},
    )
    (folder / "model.safetensors").unlink()
    (folder / "sq-llama-7b-w4-s0.pt").write_bytes(b"PK\x03\x04")
    composition = composed(folder)
    assert composition.method is not None
    assert composition.method.name == "squeezellm"
    found = errors(composition)["squeezellm-pickle"]
    assert found.offenders == ("sq-llama-7b-w4-s0.pt",)
    assert "quantserve convert --method squeezellm" in found.fix


def test_counts_of_the_original_file(tmp_path: Path) -> None:
    model = composed(make_llama(tmp_path / "m", "squeezellm")).model
    target = composed(make_llama(tmp_path / "n", "squeezellm")).target
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    tensors = llama_tensors("squeezellm", sparse=0.01)
    for stated, codes in ((655, []), (600, ["squeezellm-sparse"])):
        checkpoint = Checkpoint.from_tensors(config, tensors, other={f"sparse_threshold.{Q}": stated})
        found = list(plugin.quantserve_validate(checkpoint, model, target))
        assert [finding.code for finding in found] == codes


@pytest.mark.parametrize(
    ("dtype", "target"), [("F16", "a10g"), ("BF16", "cpu"), ("BF16", "v100"), ("F32", "l4"), ("F32", "v100")]
)
def test_vllms_own_dtype_is_left_to_vllm(tmp_path: Path, dtype: str, target: str) -> None:
    composition = composed(make_llama(tmp_path / "m", "squeezellm", dtype=dtype), target)
    assert not errors(composition)
    assert "dtype" not in composition.engine_kwargs


def test_published_performance(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", "squeezellm", **LLAMA_7B)
    expected = composed(folder, "a100-80g").expected
    assert expected is not None
    assert (expected.e2e_ms, expected.output_tokens_per_s) == (42372, 9.13)
    predicted = composed(folder, "a100-80g", 2).expected
    assert predicted is not None
    assert predicted.source == "roofline"


@pytest.mark.parametrize(("feature", "served"), [("avx512_bf16", "bfloat16"), ("avx512f", None)])
def test_float16_activations_are_not_emulated(tmp_path: Path, feature: str, served: str | None) -> None:
    composition = composed(make_llama(tmp_path / "m", "squeezellm"))
    target = Target("cpu", "cpu", 2**34, count=1, cores=2, features=(feature,))
    assert plugin.quantserve_engine_kwargs(composition.checkpoint, composition.model, target).get("dtype") == served
    said = {finding.code for finding in plugin.quantserve_validate(composition.checkpoint, composition.model, target)}
    assert ("squeezellm-dtype" in said) == (served == "bfloat16")


@pytest.mark.parametrize(
    ("installed", "target", "code"),
    [
        ((), "cpu", None),
        (("vllm",), "cpu", "squeezellm-no-kernels"),
        (("vllm",), "a100-80g", "squeezellm-no-kernels"),
        (("vllm", "quantserve_kernels"), "cpu", "squeezellm-plain-torch"),
        (("vllm", "quantserve_kernels"), "a100-80g", None),  # its kernels are compiled as they run
    ],
)
def test_missing_kernels_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], target: str, code: str | None
) -> None:
    for module in (codebook, cpu_kernels):
        monkeypatch.setattr(module, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(quantserve_kernels, "status", lambda: quantserve_kernels.Status(False, "torch", "no compiler"))
    said = findings(composed(make_llama(tmp_path / "m", "squeezellm"), target))
    assert said.keys() & {"squeezellm-no-kernels", "squeezellm-plain-torch"} == ({code} if code else set())
