"""The helpers plugins check their linears with."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest

from helpers.checkpoints import Spec, llama_tensors
from quantserve.api import Expected, Linear, check_linears, check_shards, linears, quantized_linears, shard_k, shard_n
from quantserve.checkpoint import Checkpoint
from quantserve.finding import Finding
from quantserve.layers import other_tensors

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
UP = "model.layers.0.mlp.up_proj"


def layout(linear: Linear) -> Mapping[str, Expected]:
    groups = linear.k // 128
    return {
        "qweight": Expected((linear.k, linear.n // 8), ("I32",)),
        "qzeros": Expected((groups, linear.n // 8), ("I32",)),
        "scales": Expected((groups, linear.n), ("F16", "BF16")),
    }


def with_tensors(changes: Mapping[str, Spec], drop: tuple[str, ...] = ()) -> Checkpoint:
    tensors: dict[str, Any] = dict(llama_tensors("awq")) | dict(changes)
    return Checkpoint.from_tensors(CONFIG, {name: spec for name, spec in tensors.items() if name not in drop})


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_a_good_checkpoint_has_no_findings() -> None:
    assert check_linears(with_tensors({}), layout, code="x") == []


def test_llama_linears() -> None:
    every = linears(with_tensors({}))
    assert len(every) == 14
    assert every[1] == Linear("model.layers.0.self_attn.k_proj", 128, 256, "column", "qkv_proj", 2)
    assert every[6] == Linear("model.layers.0.mlp.down_proj", 256, 512, "row")
    assert every[1].group == "model.layers.0.self_attn.qkv_proj"
    assert [shard_n(every[1], ranks) for ranks in (1, 2, 4)] == [128, 64, 64]
    assert [shard_k(every[6], ranks) for ranks in (1, 2, 4)] == [512, 256, 128]


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        ({"model_type": "mixtral", "num_local_experts": 2}, "model.layers.1.block_sparse_moe.experts.1.w2", (256, 512)),
        ({"model_type": "phi3"}, "model.layers.0.self_attn.qkv_proj", (512, 256)),
        ({"model_type": "phi3"}, "model.layers.0.mlp.gate_up_proj", (1024, 256)),
        ({"model_type": "qwen3"}, "model.layers.0.self_attn.q_proj", (512, 256)),
        (
            {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 64, "mlp_only_layers": [0]},
            "model.layers.1.mlp.experts.3.down_proj",
            (256, 64),
        ),
    ],
)
def test_other_families(config: dict[str, Any], name: str, expected: tuple[int, int]) -> None:
    found = {linear.name: linear for linear in linears(Checkpoint.from_tensors({**CONFIG, **config}))}
    assert (found[name].n, found[name].k) == expected


@pytest.mark.parametrize(
    ("config", "name", "shape"),
    [
        ({"model_type": "qwen2"}, "model.layers.1.self_attn.k_proj.bias", (128,)),
        ({"model_type": "qwen3", "head_dim": 64}, "model.layers.0.self_attn.q_norm.weight", (64,)),
        ({"attention_bias": True}, "model.layers.0.self_attn.o_proj.bias", (256,)),
        ({"mlp_bias": True}, "model.layers.0.mlp.gate_proj.bias", (512,)),
        ({}, "lm_head.weight", (512, 256)),
        ({"tie_word_embeddings": True}, "lm_head.weight", None),
        ({"model_type": "mixtral", "num_local_experts": 2}, "model.layers.0.block_sparse_moe.gate.weight", (2, 256)),
        ({"architectures": ["LlamaModel"]}, "lm_head.weight", None),
        ({"model_type": "gemma2"}, "model.layers.0.pre_feedforward_layernorm.weight", (256,)),
    ],
)
def test_tensors_beside_linears(config: dict[str, Any], name: str, shape: tuple[int, ...] | None) -> None:
    assert other_tensors(Checkpoint.from_tensors({**CONFIG, **config})).get(name) == shape


def test_the_prefix_of_a_multimodal_model_is_found() -> None:
    tensors = {f"language_model.{name}": spec for name, spec in llama_tensors("awq").items()}
    tensors["vision_tower.layers.0.mlp.fc1.weight"] = ("F16", (8, 8))
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": CONFIG}
    checkpoint = Checkpoint.from_tensors(config, tensors)
    assert linears(checkpoint)[0].name == "language_model.model.layers.0.self_attn.q_proj"
    assert check_linears(checkpoint, layout, code="x") == []
    assert set(other_tensors(checkpoint)) <= set(tensors)


def test_an_unknown_family_gives_the_linears_its_files_hold() -> None:
    tensors: dict[str, Any] = {
        "transformer.h.0.attn.q_proj.weight": ("F16", (64, 32)),
        "transformer.h.0.mlp.fc2.weight": ("F16", (32, 128)),
        "transformer.h.0.norm.weight": ("F16", (32,)),
        "transformer.wte.weight": ("F16", (100, 32)),
    }
    found = linears(Checkpoint.from_tensors({"model_type": "newmodel"}, tensors))
    assert [(linear.name, linear.n, linear.k, linear.parallel) for linear in found] == [
        ("transformer.h.0.attn.q_proj", 64, 32, "column"),
        ("transformer.h.0.mlp.fc2", 32, 128, "row"),
    ]


def test_missing() -> None:
    checkpoint = with_tensors({}, drop=(f"{UP}.qzeros", "model.layers.1.self_attn.q_proj.scales"))
    finding = only(check_linears(checkpoint, layout, code="x"))
    assert finding.code == "x-missing-tensors"
    assert finding.offenders == (f"{UP}.qzeros", "model.layers.1.self_attn.q_proj.scales")
    assert "2 tensors missing" in finding.message


def test_a_whole_missing_module_is_missing_not_dense() -> None:
    drop = tuple(f"{UP}.{suffix}" for suffix in ("qweight", "qzeros", "scales"))
    assert only(check_linears(with_tensors({}, drop), layout, code="x")).offenders == drop


def test_wrong_shape() -> None:
    finding = only(check_linears(with_tensors({f"{UP}.scales": ("F16", (4, 512))}), layout, code="x"))
    assert finding.code == "x-wrong-shape"
    assert finding.offenders == (f"{UP}.scales [4, 512], expected [2, 512]",)


def test_wrong_dtype() -> None:
    finding = only(check_linears(with_tensors({f"{UP}.qweight": ("I16", (256, 64))}), layout, code="x"))
    assert finding.code == "x-wrong-dtype"
    assert finding.offenders == (f"{UP}.qweight I16, expected I32",)


def test_unexpected() -> None:
    finding = only(check_linears(with_tensors({f"{UP}.g_idx": ("I32", (256,))}), layout, code="x"))
    assert finding.code == "x-unexpected-tensors"
    assert finding.offenders == (f"{UP}.g_idx [256]",)


def as_dense(*names: str) -> Checkpoint:
    """The AWQ model with these linears stored unquantized."""
    tensors = {name: spec for name, spec in llama_tensors("awq").items() if not name.startswith(names)}
    dense = {name: spec for name, spec in llama_tensors("fp16").items() if name.startswith(names)}
    every: dict[str, Any] = {**tensors, **dense}
    return Checkpoint.from_tensors(CONFIG, every)


def test_skipped_linears_are_not_missing() -> None:
    checkpoint = as_dense("model.layers.0.mlp.down_proj")
    assert check_linears(checkpoint, layout, code="x") == []
    quantized, dense = quantized_linears(checkpoint, layout)
    assert [linear.name for linear in dense] == ["model.layers.0.mlp.down_proj"]
    assert len(quantized) == 13


def test_a_fused_group_quantized_in_part() -> None:
    finding = only(check_linears(as_dense("model.layers.1.self_attn.k_proj"), layout, code="x"))
    assert finding.code == "x-partly-quantized"
    assert finding.offenders[0].startswith("model.layers.1.self_attn.qkv_proj: k_proj unquantized")


@pytest.mark.parametrize(
    ("skipped", "offender"),
    [(["layers.1."], "model.layers.0.mlp.down_proj"), (["down_proj"], "model.layers.1.mlp.down_proj")],
)
def test_the_skip_list_disagrees_with_the_files(skipped: list[str], offender: str) -> None:
    findings = check_linears(as_dense("model.layers.0.mlp.down_proj"), layout, code="x", skipped=skipped)
    assert {finding.code for finding in findings} == {"x-skip-list"}
    assert any(offender in finding.offenders for finding in findings)


def test_the_skip_list_agrees_with_the_files() -> None:
    assert check_linears(as_dense("model.layers.0.mlp"), layout, code="x", skipped=["layers.0.mlp"]) == []


def test_shards() -> None:
    every = linears(with_tensors({}))
    assert check_shards(every, 2, code="x-group", why="groups of 128", k_multiple=128) == []
    finding = only(check_shards(every, 4, code="x-group", why="groups of 128", k_multiple=128, n_multiple=8))
    assert finding.code == "x-group"
    assert finding.offenders == (
        "model.layers.0.self_attn.o_proj: K 256/4 = 64 is not a multiple of 128",
        "model.layers.1.self_attn.o_proj: K 256/4 = 64 is not a multiple of 128",
    )
    assert "to 2, which works" in finding.fix


def test_shards_of_fused_modules() -> None:
    every = linears(with_tensors({}))
    finding = only(check_shards(every, 1, code="x", why="768 columns at a time", fused_n_multiple=768))
    assert "model.layers.0.self_attn.qkv_proj: N 512 per rank" in finding.offenders[0]


def test_no_smaller_size_helps() -> None:
    odd = [Linear("m.down_proj", 64, 29568, "row")]
    finding = only(check_shards(odd, 2, code="x", why="groups of 128", k_multiple=128))
    assert "29568/2 = 14784 is not a multiple of 128" in finding.message
    assert "to 1, which works" in finding.fix


def test_70b_is_quick() -> None:
    sizes: dict[str, Any] = {
        "layers": 80,
        "hidden": 8192,
        "intermediate": 28672,
        "heads": 64,
        "kv_heads": 8,
        "vocab": 32000,
    }
    config = CONFIG | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 32000,
    }  # fmt: skip
    checkpoint = Checkpoint.from_tensors(config, llama_tensors("awq", **sizes))
    start = time.process_time()
    assert check_linears(checkpoint, layout, code="x") == []
    assert time.process_time() - start < 1.0
