"""Tensors beside the linears: blocks of one kind compared with each other, and how large the linears are."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest

from helpers.checkpoints import llama_tensors
from quantserve.checkpoint import Checkpoint
from quantserve.checks.tensors import check_size, check_tensors
from quantserve.finding import Finding
from quantserve.method import Method

NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
ATTENTION = tuple(f"self_attn.{part}_proj.weight" for part in "qkvo")
DENSE = tuple(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
ROUTED = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")
EXPERTS = tuple(f"mlp.experts.{i}.{part}_proj.weight" for i in range(64) for part in ("gate", "up", "down"))
MAMBA = ("mamba.A_log", "mamba.D", "mamba.conv1d.weight", "mamba.in_proj.weight", "mamba.out_proj.weight")
BLOCK = (*NORMS, *ATTENTION, *DENSE)
MIXTURE = (*NORMS, *ATTENTION, *ROUTED, *EXPERTS)
MTP = (*MIXTURE, "eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.norm.weight", "shared_head.head.weight")


def blocks(*kinds: Iterable[str], prefix: str = "model.layers") -> list[str]:
    return [f"{prefix}.{index}.{name}" for index, kind in enumerate(kinds) for name in kind]


def hybrid() -> list[str]:
    """Attention in every eighth block, a mixture in every second: Jamba, with all four kinds."""
    kinds = []
    for index in range(32):
        mixer = ATTENTION if index % 8 == 4 else MAMBA
        kinds.append((*NORMS, *mixer, *(EXPERTS if index % 2 else DENSE)))
    return blocks(*kinds)


def differing(names: Iterable[str], *, drop: Iterable[str] = ()) -> tuple[str, ...]:
    left = set(drop)
    tensors: dict[str, Any] = {name: ("F16", (8, 8) if "proj" in name else (8,)) for name in names if name not in left}
    findings = [
        f for f in check_tensors(Checkpoint.from_tensors({"model_type": "new"}, tensors)) if f.code == "blocks-differ"
    ]
    return findings[0].offenders if findings else ()


TOWERS = [
    *blocks(*[BLOCK] * 12, prefix="language_model.model.layers"),
    *blocks(*[BLOCK] * 27, prefix="vision_model.encoder.layers"),
    *blocks(*[("attn.weight",)] * 5, prefix="resampler.blocks"),
]
REGULAR = {
    "dense": blocks(*[BLOCK] * 12),
    "one dense layer first": blocks(BLOCK, *[MIXTURE] * 26),
    "three dense layers first, multi-token prediction last": blocks(*[BLOCK] * 3, *[MIXTURE] * 58, MTP),
    "dense and mixture in turn": blocks(*[BLOCK, MIXTURE] * 12),
    "hybrid": hybrid(),
    "attention in 4 of 40": blocks(*[(*NORMS, *(ATTENTION if i in (5, 15, 25, 35) else MAMBA)) for i in range(40)]),
    "one attention layer": blocks(*[(*NORMS, *(ATTENTION if i == 3 else MAMBA)) for i in range(12)]),
    "one mixer a layer": blocks(*[("norm.weight", *kind) for kind in [MAMBA, DENSE] * 10 + [ATTENTION]]),
    "no norm in the first block": blocks(BLOCK[1:], *[BLOCK] * 21),
    "no scale in the first block": blocks(MIXTURE, *[(*MIXTURE, "mlp.router_scale")] * 20),
    "cross attention": blocks(*[(*NORMS, *DENSE, "x_attn.q_proj.weight") if i % 5 == 3 else BLOCK for i in range(40)]),
    "layers that share keys and values": blocks(*[BLOCK] * 15, *[[n for n in BLOCK if "k_proj" not in n]] * 15),
    "layers without attention": blocks(*[[n for n in BLOCK if i % 7 != 5 or "attn" not in n] for i in range(40)]),
    "a shared block": blocks(*[MAMBA] * 5, (*MAMBA, *BLOCK, "linear.weight"), *[MAMBA] * 5, (*MAMBA, "linear.weight")),
    "towers": TOWERS,
    "numbers left out": [name for name in blocks(*[BLOCK] * 30) if ".7." not in name and ".12." not in name],
    "fewer experts in the last block": blocks(*[MIXTURE] * 26, (*NORMS, *ATTENTION, *ROUTED, *EXPERTS[:96])),
    "stages": blocks(*[(*BLOCK, "down.norm.weight", "down.proj.weight")] * 2, (*BLOCK, "blocks.1.x.weight"), BLOCK),
    "two blocks": blocks(BLOCK, BLOCK[:-1]),
    "no blocks": ["embed.weight", "head.weight"],
}  # fmt: skip


@pytest.mark.parametrize("name", REGULAR)
def test_kinds_of_blocks_are_told_apart(name: str) -> None:
    assert differing(REGULAR[name]) == ()


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("dense", "model.layers.7.mlp.up_proj.weight"),
        ("dense", "model.layers.0.self_attn.o_proj.weight"),
        ("dense", "model.layers.11.input_layernorm.weight"),
        ("one dense layer first", "model.layers.9.mlp.gate.e_score_correction_bias"),
        ("one dense layer first", "model.layers.9.mlp.experts.40.up_proj.weight"),
        ("one dense layer first", "model.layers.0.self_attn.q_proj.weight"),
        ("three dense layers first, multi-token prediction last", "model.layers.60.mlp.gate.weight"),
        ("three dense layers first, multi-token prediction last", "model.layers.61.self_attn.k_proj.weight"),
        ("dense and mixture in turn", "model.layers.10.mlp.down_proj.weight"),
        ("hybrid", "model.layers.12.self_attn.v_proj.weight"),
        ("hybrid", "model.layers.13.mamba.D"),
        ("attention in 4 of 40", "model.layers.15.self_attn.q_proj.weight"),
        ("attention in 4 of 40", "model.layers.16.mamba.A_log"),
        ("towers", "vision_model.encoder.layers.26.mlp.up_proj.weight"),
        ("towers", "language_model.model.layers.3.mlp.up_proj.weight"),
        ("numbers left out", "model.layers.29.mlp.up_proj.weight"),
    ],
)
def test_a_missing_tensor_is_found_among_its_kind(name: str, missing: str) -> None:
    assert missing in REGULAR[name]
    assert differing(REGULAR[name], drop=[missing]) == (missing,)


def test_all_tensors_of_a_missing_quantized_linear_are_named() -> None:
    parts = ("qweight", "qzeros", "scales")
    names = [name.removesuffix("weight") + part for name in REGULAR["dense"] for part in parts]
    drop = [f"model.layers.4.mlp.up_proj.{part}" for part in parts]
    assert differing(names, drop=drop) == tuple(drop)
    assert differing(names, drop=drop[1:2]) == (drop[1],)


def test_blocks_with_different_gaps_are_all_found() -> None:
    drop = ("model.layers.2.mlp.up_proj.weight", "model.layers.8.self_attn.k_proj.weight")
    assert differing(REGULAR["dense"], drop=drop) == drop


def test_numbers_of_blocks_may_be_anything() -> None:
    names = [f"layers.{index}.{name}" for index in ("007", "7", "9" * 30, "10", "11", "12") for name in BLOCK]
    assert differing(names) == ()
    assert differing(names, drop=["layers.11.mlp.up_proj.weight"]) == ("layers.11.mlp.up_proj.weight",)


def test_many_kinds_take_no_time() -> None:
    names = [f"layers.{i}.{'x' * (i % 7)}.{i % (j + 1)}.{j}.w" for i in range(1000) for j in range(30)]
    names += [f"layers.{i}.w{i}" for i in range(10_000)]
    start = time.process_time()
    differing(names)
    assert time.process_time() - start < 2


# --- sizes ---------------------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip


def size(tensors: dict[str, Any]) -> str:
    method = Method("nf4", "4-bit", (4,), "nf4")
    findings: list[Finding] = list(check_size(Checkpoint.from_tensors(CONFIG, tensors), method))
    return findings[0].message if findings else ""


def test_the_size_counts_what_extends_the_packed_tensor() -> None:
    tensors: dict[str, Any] = {}
    for name, (dtype, shape) in llama_tensors("fp16").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = (dtype, shape)
            continue
        codes = shape[0] * shape[1]
        tensors |= {name: ("U8", (codes // 2, 1)), f"{name}.absmax": ("F32", (codes // 64,))}
    assert size(tensors).startswith("Linear layers: 0.6 MiB (4.50 bits/weight, 28 % of float16). vLLM uses the memory")


def test_a_quantized_lm_head_is_the_methods() -> None:
    tensors: dict[str, Any] = dict(llama_tensors("fp16"))
    tensors |= {"lm_head.weight": ("F8_E4M3", (512, 256)), "lm_head.weight_scale": ("F32", ())}
    assert list(check_tensors(Checkpoint.from_tensors(CONFIG, tensors))) == []
    tensors["lm_head.weight"] = ("F16", (500, 256))
    del tensors["lm_head.weight_scale"]
    (finding,) = check_tensors(Checkpoint.from_tensors(CONFIG, tensors))
    assert finding.code == "vocabulary-mismatch"
