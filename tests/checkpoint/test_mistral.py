"""Mistral's own format: params.json and its tensor names, as vLLM adapts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import write_safetensors
from quantserve.checkpoint import open_checkpoint
from quantserve.checkpoint.mistral import adapted, translated
from quantserve.config import load

PARAMS = {
    "dim": 64, "n_layers": 2, "head_dim": 16, "hidden_dim": 128, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5,
    "vocab_size": 96, "rope_theta": 1e6, "max_position_embeddings": 4096,
}  # fmt: skip


def tensors() -> dict[str, tuple[str, tuple[int, ...]]]:
    made: dict[str, tuple[str, tuple[int, ...]]] = {
        "tok_embeddings.weight": ("BF16", (96, 64)),
        "norm.weight": ("BF16", (64,)),
        "output.weight": ("BF16", (96, 64)),
    }
    for layer in range(2):
        made |= {
            f"layers.{layer}.attention.wq.weight": ("BF16", (64, 64)),
            f"layers.{layer}.attention.wk.weight": ("BF16", (32, 64)),
            f"layers.{layer}.attention.wv.weight": ("BF16", (32, 64)),
            f"layers.{layer}.attention.wo.weight": ("BF16", (64, 64)),
            f"layers.{layer}.feed_forward.w1.weight": ("BF16", (128, 64)),
            f"layers.{layer}.feed_forward.w2.weight": ("BF16", (64, 128)),
            f"layers.{layer}.feed_forward.w3.weight": ("BF16", (128, 64)),
            f"layers.{layer}.attention_norm.weight": ("BF16", (64,)),
            f"layers.{layer}.ffn_norm.weight": ("BF16", (64,)),
        }
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "m"
    made.mkdir()
    (made / "params.json").write_text(json.dumps(PARAMS))
    (made / "tekken.json").write_text("{}")
    write_safetensors(made / "consolidated.safetensors", tensors())
    return made


def test_the_format_is_read_and_complete(folder: Path) -> None:
    from quantserve.checks.model import check_model
    from quantserve.target import find_target

    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.config["architectures"] == ["MistralForCausalLM"]
    assert checkpoint.text_config["hidden_size"] == 64
    assert checkpoint.text_config["sliding_window"] is None, "not the default of transformers' class"
    (model,) = load(str(folder)).models
    assert check_model(checkpoint, model, find_target("l4"), None) == []


def test_a_missing_tensor_is_found(folder: Path) -> None:
    from quantserve.checks.model import check_model
    from quantserve.target import find_target

    kept = {name: spec for name, spec in tensors().items() if name != "layers.1.ffn_norm.weight"}
    write_safetensors(folder / "consolidated.safetensors", kept)
    (model,) = load(str(folder)).models
    (finding,) = check_model(open_checkpoint(str(folder)), model, find_target("l4"), None)
    assert finding.code == "model-tensors-missing"
    assert finding.offenders == ("model.layers.1.post_attention_layernorm.weight",)


@pytest.mark.parametrize(
    ("more", "architecture"),
    [
        ({}, "MistralForCausalLM"),
        ({"moe": {"num_experts": 8, "num_experts_per_tok": 2}}, "MixtralForCausalLM"),
        ({"moe": {"num_experts": 8, "num_shared_experts": 1, "num_experts_per_tok": 2}}, "MistralLarge3ForCausalLM"),
        ({"vision_encoder": {"hidden_size": 8}}, "PixtralForConditionalGeneration"),
        ({"multimodal": {"vision_encoder_args": {"hidden_size": 8}}}, "PixtralForConditionalGeneration"),
        ({"multimodal": {"whisper_model_args": {"encoder_args": {}}}}, "VoxtralForConditionalGeneration"),
        ({"moe": "junk", "multimodal": 7, "quantization": [], "sliding_window": [], "yarn": 3}, "MistralForCausalLM"),
    ],
)
def test_kinds(more: dict[str, Any], architecture: str) -> None:
    assert adapted({**PARAMS, **more})["architectures"] == [architecture]


def test_windows_quantization_and_yarn() -> None:
    made = adapted(
        {
            **PARAMS,
            "sliding_window": [None, 1024],
            "quantization": {"qformat_weight": "fp8_e4m3"},
            "yarn": {"factor": 8, "original_max_position_embeddings": 512},
        }
    )
    assert made["layer_types"] == ["full_attention", "sliding_attention"]
    assert made["sliding_window"] == 1024
    assert made["quantization_config"]["quant_method"] == "fp8"
    assert made["rope_parameters"]["rope_type"] == "yarn"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.3.attention.wq.qscale_weight", "model.layers.3.self_attn.q_proj.weight_scale"),
        ("layers.3.feed_forward.experts.2.w1.weight", "model.layers.3.block_sparse_moe.experts.2.w1.weight"),
        ("layers.3.feed_forward.gate.weight", "model.layers.3.block_sparse_moe.gate.weight"),
        ("vision_encoder.layers.0.attention.wq.weight", "vision_encoder.layers.0.attention.wq.weight"),
        ("output.weight", "lm_head.weight"),
        ("odd", "odd"),
        ("", ""),
    ],
)  # fmt: skip
def test_names(name: str, expected: str) -> None:
    assert translated(name) == expected
