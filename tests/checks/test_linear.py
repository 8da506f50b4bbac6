"""The helpers plugins check their linears with."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest

from helpers.checkpoints import Spec, llama_tensors
from quantserve.api import (
    Expected,
    Linear,
    check_linears,
    check_shards,
    linears,
    modules,
    quantized_linears,
    shard_k,
    shard_n,
)
from quantserve.checkpoint import Checkpoint
from quantserve.checks.linear import Layout
from quantserve.finding import Finding, Severity
from quantserve.model.layers import other_tensors

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
    every = linears(Checkpoint.from_tensors({**CONFIG, **config}))
    found = {module: linear for linear in every for module in linear.names}
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
    assert "2 tensors are missing" in finding.message


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


# --- a packed tensor called weight, and suffixes with dots ---------------------------------------------------


def fp8(linear: Linear) -> Mapping[str, Expected]:
    scale = Expected((), ("F32",))
    return {"weight": Expected((linear.n, linear.k), ("F8_E4M3",)), "weight_scale": scale, "input_scale": scale}


def int8(linear: Linear) -> Mapping[str, Expected]:
    return {"weight": Expected((linear.n, linear.k), ("I8",)), "weight_scale": Expected((linear.n, 1), ("BF16",))}


def nf4(linear: Linear) -> Mapping[str, Expected]:
    return {
        "weight": Expected((linear.n * linear.k // 2, 1), ("U8",)),
        "weight.absmax": Expected((linear.n * linear.k // 64,), ("F32",)),
        "weight.quant_map": Expected((16,), ("F32",)),
        "weight.quant_state.bitsandbytes__nf4": Expected((None,), ("U8",)),
    }


def stored(layout: Layout, dense: tuple[str, ...] = ()) -> dict[str, Spec]:
    """The Llama in a method's layout; linears whose path has a part of `dense` stay bfloat16."""
    tensors: dict[str, Spec] = {n: s for n, s in llama_tensors("fp16").items() if not n.endswith("_proj.weight")}
    for linear in linears(Checkpoint.from_tensors(CONFIG)):
        if any(part in linear.name for part in dense):
            tensors[f"{linear.name}.weight"] = ("BF16", (linear.n, linear.k))
            continue
        for suffix, what in layout(linear).items():
            tensors[f"{linear.name}.{suffix}"] = (what.dtypes[0], tuple(100 if n is None else n for n in what.shape))
    return tensors


def edited(tensors: dict[str, Spec], changes: Mapping[str, Spec], drop: tuple[str, ...] = ()) -> Checkpoint:
    every: dict[str, Any] = {name: spec for name, spec in (tensors | dict(changes)).items() if name not in drop}
    return Checkpoint.from_tensors(CONFIG, every)


@pytest.mark.parametrize("layout", [fp8, int8, nf4])
def test_a_packed_tensor_called_weight(layout: Layout) -> None:
    checkpoint = edited(stored(layout, ("layers.0.self_attn",)), {})
    assert check_linears(checkpoint, layout, code="x") == []
    quantized, dense = quantized_linears(checkpoint, layout)
    assert (len(quantized), {linear.name.split(".")[3] for linear in dense}) == (10, {"self_attn"})
    half = edited(stored(layout, ("layers.0.self_attn.q_proj",)), {})
    assert only(check_linears(half, layout, code="x")).code == "x-partly-quantized"


@pytest.mark.parametrize("layout", [fp8, int8, nf4])
def test_mistakes_in_a_packed_tensor_called_weight(layout: Layout) -> None:
    tensors = stored(layout)
    parts = list(layout(linears(Checkpoint.from_tensors(CONFIG))[4]))
    for part in parts[1:]:
        finding = only(check_linears(edited(tensors, {}, (f"{UP}.{part}",)), layout, code="x"))
        assert (finding.code, finding.offenders) == ("x-missing-tensors", (f"{UP}.{part}",))
    finding = only(check_linears(edited(tensors, {}, (f"{UP}.weight",)), layout, code="x"))
    assert (finding.code, finding.offenders) == ("x-missing-tensors", (f"{UP}.weight",))
    unpacked = {f"{UP}.weight": ("BF16", (512, 256))}
    codes = {finding.code for finding in check_linears(edited(tensors, unpacked), layout, code="x")}
    assert "x-wrong-dtype" in codes


@pytest.mark.parametrize("suffix", ["weight.nested_absmax", "weight.quant_state.bitsandbytes__fp4", "SCB"])
def test_tensors_a_method_does_not_know(suffix: str) -> None:
    finding = only(check_linears(edited(stored(nf4), {f"{UP}.{suffix}": ("F32", (3,))}), nf4, code="x"))
    assert (finding.code, finding.offenders) == ("x-unexpected-tensors", (f"{UP}.{suffix} [3]",))
    skipped = stored(nf4, ("mlp",)) | {f"{UP}.{suffix}": ("F32", (3,))}
    assert only(check_linears(edited(skipped, {}), nf4, code="x")).offenders == (f"{UP}.{suffix} [3]",)


def test_modules_keep_what_extends_their_tensors() -> None:
    config = {"model_type": "newmodel"}
    tensors: dict[str, Any] = {
        "m.layers.0.fc.weight": ("U8", (64, 1)),
        "m.layers.0.fc.weight.absmax": ("F32", (2,)),
        "m.layers.0.fc.weight.quant_state.bitsandbytes__nf4": ("U8", (90,)),
        "m.layers.0.norm.weight": ("F16", (8,)),
        "scale": ("F32", ()),
    }
    found = modules(Checkpoint.from_tensors(config, tensors))
    assert {module: sorted(suffixes) for module, suffixes in found.items()} == {
        "m.layers.0.fc": ["weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"],
        "m.layers.0.norm": ["weight"],
        "": ["scale"],
    }


def test_cache_scales_and_biases_are_no_parts_of_a_method() -> None:
    extra: dict[str, Spec] = {
        "model.layers.0.self_attn.k_proj.k_scale": ("F32", ()),
        "model.layers.0.self_attn.v_proj.v_zero_point": ("F32", ()),
        "model.layers.0.self_attn.q_proj.bias": ("F16", (256,)),
    }
    for dense in ((), ("self_attn",)):
        assert check_linears(edited(stored(fp8, dense), extra), fp8, code="x") == []


def test_the_transformers_backend_may_fuse() -> None:
    config = {**CONFIG, "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}
    tensors: dict[str, Any] = stored(fp8, ("layers.0.self_attn.q_proj",))
    finding = only(check_linears(Checkpoint.from_tensors(config, tensors), fp8, code="x"))
    assert (finding.code, finding.severity) == ("x-partly-quantized", Severity.WARNING)


# --- routers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "router",
    [
        "mlp.gate", "mlp.gate.wg", "mlp.router", "mlp.router.classifier", "block_sparse_moe.gate",
        "block_sparse_moe.router.layer", "ffn.router.layer", "feed_forward.router", "feed_forward.gate", "router.proj",
        "mlp.shared_expert_gate", "mixer.gate", "moe.gate", "mlp.router.gate",
    ],
)  # fmt: skip
def test_routers_are_no_linears(router: str) -> None:
    tensors: dict[str, Any] = {
        f"model.layers.0.{router}.weight": ("F16", (8, 64)),
        "model.layers.0.mlp.gate_proj.weight": ("F16", (128, 64)),
        "model.layers.0.mlp.gate_up_proj.weight": ("F16", (128, 64)),
    }
    found = linears(Checkpoint.from_tensors({"model_type": "newmoe"}, tensors))
    assert [linear.name.rpartition(".")[2] for linear in found] == ["gate_proj", "gate_up_proj"]


def test_experts_of_a_family_known_from_the_files_are_one_layer() -> None:
    tensors: dict[str, Any] = {
        f"model.layers.0.mlp.experts.{expert}.{part}.weight": ("F16", (64, 64))
        for expert in (0, 1)
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    tensors["model.layers.0.mlp.shared_experts.gate_proj.weight"] = ("F16", (64, 64))
    checkpoint = Checkpoint.from_tensors({"model_type": "newmoe"}, tensors)
    assert {linear.group for linear in linears(checkpoint)} == {
        "model.layers.0.mlp.experts",
        "model.layers.0.mlp.shared_experts.gate_up_proj",
    }


@pytest.mark.parametrize("dtype", ["U8", "I32"])
def test_packed_weights_of_such_a_family_are_left_to_the_method(dtype: str) -> None:
    tensors: dict[str, Any] = {"model.layers.0.mlp.fc1.weight": (dtype, (64, 1))}
    assert linears(Checkpoint.from_tensors({"model_type": "newmodel"}, tensors)) == ()


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
