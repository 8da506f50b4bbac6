"""What the light module says of GPTQ checkpoints: the claim, the settings of each linear, the engine, the refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import llama_tensors, make_llama, read_header, variant
from helpers.composed import composed, errors, findings
from helpers.predicted import model
from quantserve.api import Checkpoint, Linear, Target, linears
from quantserve.target import GIB, find_target
from quantserve_gptq import plugin
from quantserve_gptq.limits import each

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
EPYC = Target("cpu", "cpu", 64 * GIB, count=1, cores=2, features=("avx2", "avx512f", "avx512_bf16"))
XEON = replace(EPYC, features=(*EPYC.features, "amx_bf16", "amx_int8"))
A100 = find_target("a100-80g")
DOWN = "model.layers.0.mlp.down_proj"


def checkpoint(bits: dict[str, int] | None = None, config: dict[str, Any] | None = None, **changes: Any) -> Checkpoint:
    """A Llama in GPTQ's tensors; `bits` by the end of a module's name, 0 for a plain linear."""
    values = {**CONFIG, **(config or {})}
    group = values["group_size"]
    tensors: dict[str, Any] = {}
    for name, (dtype, shape) in llama_tensors("fp16").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            tensors[name] = (dtype, shape)
            continue
        width = next((value for end, value in (bits or {}).items() if module.endswith(end)), values["bits"])
        n, k = shape
        rows = 1 if group == -1 else k // group
        tensors |= (
            {
                f"{module}.qweight": ("I32", (k * width // 32, n)),
                f"{module}.qzeros": ("I32", (rows, n * width // 32)),
                f"{module}.scales": ("F16", (rows, n)),
                f"{module}.g_idx": ("I32", (k,)),
            }
            if width
            else {name: (dtype, shape)}
        )
    tensors |= changes.pop("tensors", {})
    base = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
        "torch_dtype": "float16", "quantization_config": values,
    }  # fmt: skip
    return Checkpoint.from_tensors({**base, **changes}, tensors)


def engine(made: Checkpoint, target: Target, ranks: int = 1) -> object:
    return plugin.quantserve_engine_kwargs(made, model(ranks), target).get("quantization", "gptq")


def codes(made: Checkpoint, target: Target = A100, ranks: int = 1) -> set[str]:
    return {finding.code for finding in plugin.quantserve_validate(made, model(ranks), target)}


@pytest.mark.parametrize(
    ("config", "on_a100", "on_xeon", "on_epyc"),
    [
        ({}, "gptq", "gptq", "gptq_codebook"),
        ({"checkpoint_format": "gptq_v2"}, "gptq", "gptq", "gptq_codebook"),
        ({"bits": 8}, "gptq", "gptq_codebook", "gptq_codebook"),
        ({"group_size": -1, "desc_act": True}, "gptq", "gptq", "gptq_codebook"),
        ({"bits": 2}, "gptq_codebook", "gptq_codebook", "gptq_codebook"),
        ({"bits": 3}, "gptq_codebook", "gptq_codebook", "gptq_codebook"),
        ({"sym": False}, "gptq_codebook", "gptq_codebook", "gptq_codebook"),
        ({"desc_act": True}, "gptq_codebook", "gptq_codebook", "gptq_codebook"),
        ({"desc_act": True, "static_groups": True}, "gptq_codebook", "gptq_codebook", "gptq_codebook"),
        ({"group_size": 16}, "gptq_codebook", "gptq_codebook", "gptq_codebook"),
    ],
)
def test_who_serves_the_files(config: dict[str, Any], on_a100: str, on_xeon: str, on_epyc: str) -> None:
    made = checkpoint(config=config)
    assert plugin.quantserve_detect(made)
    assert [engine(made, target) for target in (A100, XEON, EPYC)] == [on_a100, on_xeon, on_epyc]
    assert ("gptq-engine" in codes(made)) == (on_a100 == "gptq_codebook")
    assert each(made)[DOWN].bits == made.config["quantization_config"]["bits"]


def test_rules_give_every_linear_its_own_settings() -> None:
    rules = {"-:.*o_proj": {}, r"+:.*\.down_proj": {"bits": 8}, "+:.*": {"sym": True}}
    made = checkpoint({"o_proj": 0, "down_proj": 8}, {"dynamic": rules, "sym": False})
    found = {linear.name.rpartition(".")[2]: plugin.quantserve_scheme(made, linear) for linear in linears(made)}
    assert found["o_proj"] is None
    assert {name: scheme.bits for name, scheme in found.items() if scheme} == {
        "q_proj": 4, "k_proj": 4, "v_proj": 4, "gate_proj": 4, "up_proj": 4, "down_proj": 8,
    }  # fmt: skip
    assert not each(made)[DOWN].sym, "the first rule that matches decides alone"
    assert each(made)["model.layers.0.self_attn.q_proj"].sym


def test_vllm_matches_rules_with_the_fused_layer() -> None:
    named = checkpoint({"q_proj": 8, "k_proj": 8, "v_proj": 8}, {"dynamic": {r"+:.*\.[qkv]_proj": {"bits": 8}}})
    assert engine(named, A100) == "gptq_codebook"
    message = next(f for f in plugin.quantserve_validate(named, model(), A100) if f.code == "gptq-engine").message
    assert "matches dynamic rules with model.layers.0.self_attn.qkv_proj" in message
    layers = checkpoint({"layers.1.": 8}, {"dynamic": {r"+:model\.layers\.0\..*": {"group_size": 128}}})
    assert engine(layers, A100) == "gptq"


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"bits": 5}, "gptq-settings"),
        ({"bits": True}, "gptq-settings"),
        ({"group_size": 0}, "gptq-settings"),
        ({"sym": "yes"}, "gptq-settings"),
        ({"dynamic": {"+:(": {}}}, "gptq-settings"),
        ({"dynamic": {"+:.*": 8}}, "gptq-settings"),
        ({"dynamic": {"+:.*": {"bits": 7}}}, "gptq-settings"),
        ({"checkpoint_format": "marlin"}, "gptq-version"),
        ({"is_marlin_format": True}, "gptq-version"),
        ({"pack_dtype": "int16"}, "gptq-pack-dtype"),
    ],
)
def test_settings_that_nothing_serves(config: dict[str, Any], code: str) -> None:
    made = checkpoint()
    made = replace(made, config={**made.config, "quantization_config": {**CONFIG, **config}})
    assert codes(made) == {code}
    assert plugin.quantserve_scheme(made, Linear(DOWN, 256, 512, "row")) is None


def test_act_order_cannot_be_divided_between_ranks() -> None:
    made = checkpoint(config={"desc_act": True})
    assert "gptq-act-order" not in codes(made)
    assert "gptq-act-order" in codes(made, ranks=2)
    assert "gptq-act-order" not in codes(checkpoint(config={"desc_act": True, "static_groups": True}), ranks=2)


def test_act_order_needs_the_group_of_each_input(tmp_path: Path) -> None:
    source = Path(__file__).parent / "data" / "autoround-w4g32-sym"
    without = {name: None for name in read_header(source / "model.safetensors") if name.endswith(".g_idx")}
    assert not errors(composed(variant(tmp_path / "in-order", source, without), "cpu"))
    found = errors(composed(variant(tmp_path / "act-order", source, without, desc_act=True), "cpu"))
    assert found.keys() == {"gptq-missing-tensors"}
    assert "14 tensors are missing" in found["gptq-missing-tensors"].message


@pytest.mark.parametrize(
    ("bits", "dynamic", "says"),
    [
        ({"q_proj": 8}, {r"+:.*\.q_proj": {"bits": 8}}, "q_proj 8 bits, groups of 128; k_proj 4 bits, groups of 128"),
        ({}, {r"+:.*\.up_proj": {"sym": False}}, "up_proj 4 bits, groups of 128, asymmetric"),
        ({"down_proj": 8, "o_proj": 8}, {r"+:.*\.(down|o)_proj": {"bits": 8}}, ""),
    ],
)
def test_parts_of_a_fused_layer_have_one_width(bits: dict[str, int], dynamic: dict[str, Any], says: str) -> None:
    made = checkpoint(bits, {"dynamic": dynamic})
    every = {one.code: one for one in plugin.quantserve_validate(made, model(), EPYC)}
    assert ("gptq-mixed-layer" in every) == bool(says)
    assert not says or says in every["gptq-mixed-layer"].message


def test_words_of_another_width() -> None:
    made = checkpoint(tensors={f"{DOWN}.qweight": ("I64", (32, 256))})
    assert "gptq-pack-dtype" in codes(made)


def test_a_quantized_lm_head_that_the_config_does_not_announce() -> None:
    head = {"lm_head.qweight": ("I32", (32, 512)), "lm_head.qzeros": ("I32", (2, 64)),
            "lm_head.scales": ("F16", (2, 512)), "lm_head.g_idx": ("I32", (256,))}  # fmt: skip
    assert "gptq-lm-head" in codes(checkpoint(tensors=head))
    assert "gptq-lm-head" not in codes(checkpoint(tensors=head), EPYC)  # our engine side looks at the files
    assert "gptq-lm-head" not in codes(checkpoint(config={"lm_head": True}, tensors=head))
    assert "gptq-lm-head" in codes(checkpoint(config={"lm_head": True}))


def test_version_1_with_asymmetric_3_bits_by_gptqmodel() -> None:
    tool = {"bits": 3, "sym": False, "meta": {"quantizer": ["gptqmodel:2.0.0"]}}
    assert "gptq-3-bit-zeros" in codes(checkpoint(config=tool))
    assert "gptq-3-bit-zeros" not in codes(checkpoint(config={**tool, "checkpoint_format": "gptq_v2"}))
    assert "gptq-3-bit-zeros" not in codes(checkpoint(config={**tool, "sym": True}))


def test_no_linear_is_gptqs() -> None:
    assert "gptq-not-quantized" in codes(checkpoint({"_proj": 0}))


@pytest.mark.parametrize(("word", "stray"), [(0x77777777, False), (0x88888888, False), (0, False), (0x78777777, True)])
def test_zeros_of_symmetric_files(tmp_path: Path, word: int, stray: bool) -> None:
    """As AutoRound stores them (version 1), as version 2 does, never filled, and one that is not the middle code."""
    folder = tmp_path / "m"
    shutil.copytree(Path(__file__).parent / "data" / "autoround-w4g32-sym", folder)
    file, name = folder / "model.safetensors", f"{DOWN}.qzeros"
    raw = bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start = 8 + length + json.loads(raw[8 : 8 + length])[name]["data_offsets"][0]
    assert raw[start : start + 4] == bytes.fromhex("77777777")
    raw[start : start + 4] = word.to_bytes(4, "little")
    file.write_bytes(raw)
    found = findings(composed(folder, "cpu"))
    assert ("gptq-stray-zeros" in found) == stray
    assert not stray or name in found["gptq-stray-zeros"].message


def test_files_without_a_declared_method() -> None:
    made = checkpoint()
    bare = {key: value for key, value in made.config.items() if key != "quantization_config"}
    assert plugin.quantserve_detect(replace(made, config=bare))
    old = {key: value for key, value in CONFIG.items() if key != "quant_method"}
    assert plugin.quantserve_detect(replace(made, config=bare, quant_files={"quantize_config.json": old}))
    declared = {**made.config, "quantization_config": {"quant_method": "awq"}}
    assert not plugin.quantserve_detect(replace(made, config=declared))


@pytest.mark.parametrize("method", ["awq", "squeezellm", "fp16"])
def test_other_methods_are_not_claimed(tmp_path: Path, method: str) -> None:
    made = composed(make_llama(tmp_path / "m", method)).checkpoint
    bare = {key: value for key, value in made.config.items() if key != "quantization_config"}
    assert not plugin.quantserve_detect(made)
    assert not plugin.quantserve_detect(replace(made, config=bare))


@pytest.mark.parametrize("name", ["autoround-w4g32-sym", "autoround-w3g32-asym"])
def test_autorounds_files_are_whole(name: str) -> None:
    folder = Path(__file__).parent / "data" / name
    composition = composed(folder, "cpu")
    assert not errors(composition)
    assert composition.engine_kwargs["quantization"].value == "gptq_codebook"
    assert ("gptq-engine" in findings(composition)) == (name == "autoround-w3g32-asym")
    bits = json.loads((folder / "config.json").read_text())["quantization_config"]["bits"]
    scheme = plugin.quantserve_scheme(composition.checkpoint, Linear(DOWN, 128, 192, "row"))
    assert scheme is not None
    assert scheme.alternatives("qweight")[0].sizes(128, 192) == (Fraction(192 * bits, 32), 128)


def test_profiles_say_what_is_assumed() -> None:
    for bits in (2, 3, 4, 8):
        for target in (EPYC, XEON, A100, find_target("mi300x")):
            profile = plugin.quantserve_kernel(target, bits, "vllm-0.32")
            assert profile is not None
            assert any(word in profile.source for word in ("assumed", "derived"))
    assert plugin.quantserve_kernel(A100, 4, "vllm-0.2.2") is None


def test_the_light_module_is_light() -> None:
    script = (
        "import sys, quantserve_gptq.plugin; "
        "assert not {'torch', 'vllm', 'ray', 'transformers'} & sys.modules.keys(), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
