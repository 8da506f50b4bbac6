"""Skip lists: what vLLM builds unquantized, and how that is compared with the files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest

from helpers.checkpoints import Spec, llama_tensors
from quantserve.api import Expected, Linear, SkipList, check_linears
from quantserve.checkpoint import Checkpoint
from quantserve.checks.skipped import Match
from quantserve.finding import Finding, Severity

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
MOE: dict[str, Any] = {
    **LLAMA, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 2, "head_dim": 64,
    "moe_intermediate_size": 128,
}  # fmt: skip
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXPERTS = tuple(f"mlp.experts.{expert}.{part}" for expert in (0, 1) for part in ("gate_proj", "up_proj", "down_proj"))


def layout(linear: Linear) -> Mapping[str, Expected]:
    return {
        "qweight": Expected((linear.k, linear.n // 8), ("I32",)),
        "qzeros": Expected((None, linear.n // 8), ("I32",)),
        "scales": Expected((None, linear.n), ("F16",)),
    }


def stored(name: str, n: int, k: int, dense: bool) -> dict[str, Spec]:
    if dense:
        return {f"{name}.weight": ("F16", (n, k))}
    return {
        f"{name}.qweight": ("I32", (k, n // 8)),
        f"{name}.qzeros": ("I32", (k // 128, n // 8)),
        f"{name}.scales": ("F16", (k // 128, n)),
    }


def model(config: dict[str, Any], linears: tuple[str, ...], dense: tuple[str, ...], **extra: Spec) -> Checkpoint:
    """Two blocks of these linears, all of 128 x 256; those whose path has a part of `dense` are unquantized."""
    tensors: dict[str, Any] = {}
    for path in (f"model.layers.{index}.{name}" for index in (0, 1) for name in linears):
        tensors |= stored(path, 128, 256, any(part in path for part in dense))
    return Checkpoint.from_tensors(config, tensors | extra)


def skip_findings(checkpoint: Checkpoint, skipped: SkipList) -> list[Finding]:
    return [f for f in check_linears(checkpoint, layout, code="x", skipped=skipped) if f.code == "x-skip-list"]


def llama(*dense: str) -> Checkpoint:
    """The AWQ Llama with the linears unquantized whose path has one of these parts."""
    quantized, plain = llama_tensors("awq"), llama_tensors("fp16")
    tensors: dict[str, Any] = {n: s for n, s in quantized.items() if not any(part in n for part in dense)}
    tensors |= {n: s for n, s in plain.items() if any(part in n for part in dense)}
    return Checkpoint.from_tensors(LLAMA, tensors)


@pytest.mark.parametrize(
    ("entries", "dense"),
    [
        (["self_attn.qkv_proj"], QKV),
        (["q_proj", "k_proj", "v_proj"], QKV),
        (["mlp.gate_up_proj"], ("mlp.gate_proj", "mlp.up_proj")),
        (["model.layers.0."], ("model.layers.0.",)),
        (["self_attn", "down_proj"], ("self_attn", "down_proj")),
        (["lm_head"], ()),
        (["lm_head", "visual", "embed_tokens"], ()),
        ({"self_attn.o_proj": {}}, ("o_proj",)),
        ([""], ("layers.",)),
        (None, ("o_proj",)),
        ([], ("model.layers.1.mlp",)),
        (False, ()),
    ],
)
def test_lists_that_vllm_and_the_files_agree_on(entries: object, dense: tuple[str, ...]) -> None:
    assert check_linears(llama(*dense), layout, code="x", skipped=SkipList(entries)) == []


@pytest.mark.parametrize(
    ("entries", "dense", "offender", "text"),
    [
        (["self_attn.qkv"], (), "model.layers.0.self_attn.q_proj", "quantized in the files but named by"),
        (["lm_head"], ("o_proj",), "model.layers.0.self_attn.o_proj", "unquantized in the files but not named by"),
        (["model.layers.1."], ("layers.0.mlp",), "model.layers.0.mlp.gate_proj", "unquantized in the files but not"),
        (["q_proj"], QKV, "model.layers.0.self_attn.qkv_proj", "names a part of 2 fused layers"),
        (["gate_proj"], (), "model.layers.0.mlp.gate_up_proj", "names a part of 2 fused layers"),
        ("lm_head", (), "modules_to_not_convert", "is the text 'lm_head'"),
        ([None], (), "modules_to_not_convert", "holds None, which is no text"),
        (["lm_head", ["o_proj"]], (), "modules_to_not_convert", "holds ['o_proj'], which is no text"),
        (True, (), "modules_to_not_convert", "is True; vLLM needs a list"),
    ],
)
def test_lists_that_vllm_stops_at(entries: object, dense: tuple[str, ...], offender: str, text: str) -> None:
    finding = next(f for f in skip_findings(llama(*dense), SkipList(entries)) if text in f.message)
    assert finding.severity is Severity.ERROR
    assert finding.offenders[0] == offender
    assert finding.fix


def test_a_router_of_vllms_that_has_the_method_must_be_listed() -> None:
    gates: dict[str, Spec] = {f"model.layers.{index}.mlp.gate.weight": ("F16", (2, 256)) for index in (0, 1)}
    checkpoint = model(MOE, EXPERTS, (), **gates)
    (finding,) = skip_findings(checkpoint, SkipList(["lm_head"]))
    assert finding.offenders == ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate")
    for entries in (["gate"], ["mlp.gate"], ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"], [], None):
        assert skip_findings(checkpoint, SkipList(entries)) == [], entries
    mixtral = {**MOE, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 2}
    assert skip_findings(model(mixtral, (), (), **gates), SkipList(["lm_head"])) == []


def test_all_experts_of_a_block_are_one_layer() -> None:
    assert skip_findings(model(MOE, EXPERTS, ("experts",)), SkipList(["mlp.experts"])) == []
    (finding,) = skip_findings(model(MOE, EXPERTS, ("experts",)), SkipList(["experts.0", "experts.1"]))
    assert "not named by" in finding.message
    # The files' modules are no list for experts: none is called "experts".
    (finding,) = skip_findings(model(MOE, EXPERTS, ("layers.1.mlp.experts",)), SkipList(None))
    assert finding.offenders[0] == "model.layers.1.mlp.experts.0.gate_proj (and 1 more expert)"


@pytest.mark.parametrize(("headers", "found"), [("if_empty", 1), ("never", 1), ("also", 0)])
def test_methods_that_read_the_files_too(headers: Any, found: int) -> None:
    assert len(skip_findings(llama("o_proj"), SkipList(["lm_head"], headers=headers))) == found


def test_fp8_takes_nothing_from_the_files() -> None:
    assert len(skip_findings(llama("o_proj"), SkipList(None, "exact", headers="never"))) == 1
    names = [f"model.layers.{index}.self_attn.o_proj" for index in (0, 1)]
    assert skip_findings(llama("o_proj"), SkipList(names, "exact", headers="never")) == []


def deepseek(q_lora_rank: int | None, kind: str = "deepseek_v3", name: str = "DeepseekV3ForCausalLM") -> dict[str, Any]:
    return {**LLAMA, "architectures": [name], "model_type": kind, "q_lora_rank": q_lora_rank}


MLA = ("self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj", "self_attn.o_proj")


def test_routers_of_families_known_from_the_files() -> None:
    """DeepSeek-V2-Lite: the router is not listed, and its correction bias is no tensor of the method."""
    extra: dict[str, Spec] = {
        "model.layers.1.mlp.gate.weight": ("F16", (2, 256)),
        "model.layers.1.mlp.gate.e_score_correction_bias": ("F32", (2,)),
        "model.layers.1.mlp.shared_expert_gate.weight": ("F16", (1, 256)),
        "model.layers.2.eh_proj.weight": ("F16", (256, 512)),
        "model.layers.2.shared_head.head.weight": ("F16", (512, 256)),
        "vision_tower.encoder.layers.0.self_attn.q_proj.weight": ("F16", (64, 64)),
    }
    checkpoint = model(deepseek(None), (*MLA, *EXPERTS), ("kv_a_proj_with_mqa",), **extra)
    skipped = SkipList(["self_attn.kv_a_proj_with_mqa"])
    assert check_linears(checkpoint, layout, code="x", skipped=skipped) == []
    assert (
        check_linears(checkpoint, lambda linear: {"weight": Expected((linear.n, linear.k), ("F16",))}, code="x") == []
    )


def test_latent_attention_fuses_two_projections_where_both_are() -> None:
    linears = ("self_attn.q_a_proj", *MLA)
    checkpoint = model(deepseek(128), linears, ("kv_a_proj_with_mqa",))
    (finding,) = skip_findings(checkpoint, SkipList(["self_attn.kv_a_proj_with_mqa"]))
    assert finding.severity is Severity.ERROR
    assert finding.offenders[0] == "model.layers.0.self_attn.fused_qkv_a_proj"
    both = model(deepseek(128), linears, ("_a_proj",))
    assert check_linears(both, layout, code="x", skipped=SkipList(["q_a_proj", "kv_a_proj_with_mqa"])) == []


@pytest.mark.parametrize(
    ("architecture", "severity"),
    [
        ("CohereForCausalLM", Severity.ERROR),
        ("ArceeForCausalLM", Severity.WARNING),
        ("NewForCausalLM", Severity.WARNING),
    ],
)
def test_parts_of_a_family_known_from_the_files(architecture: str, severity: Severity) -> None:
    config = {**LLAMA, "architectures": [architecture], "model_type": "new"}
    (finding,) = check_linears(model(config, (*QKV, *MLP), ("k_proj",)), layout, code="x")
    assert (finding.code, finding.severity) == ("x-partly-quantized", severity)
    (finding,) = skip_findings(model(config, (*QKV, *MLP), ("down_proj",)), SkipList(["lm_head"]))
    assert finding.severity is Severity.WARNING
    assert finding.offenders == ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")


def test_entries_of_multimodal_models_fit_the_files_or_vllms_names() -> None:
    config = {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe", "text_config": MOE,
    }  # fmt: skip
    gates: dict[str, Any] = {
        f"model.language_model.layers.{index}.mlp.gate.weight": ("F16", (2, 256)) for index in (0, 1)
    }
    checkpoint = Checkpoint.from_tensors(config, gates)
    assert len(skip_findings(checkpoint, SkipList(["lm_head"]))) == 1
    for entry in ("model.layers.{}.mlp.gate", "model.language_model.layers.{}.mlp.gate"):
        assert skip_findings(checkpoint, SkipList([entry.format(0), entry.format(1)])) == []


@pytest.mark.parametrize(
    ("match", "entries", "layer", "parts", "expected"),
    [
        ("suffix", ["b_proj"], "m.attn.b_proj", (), True),
        ("suffix", ["b_proj"], "m.attn.q_b_proj", (), False),
        ("regex", ["re:.*(q|k)_proj$"], "m.k_proj", (), True),
        ("regex", ["re:k_proj"], "m.k_proj", (), False),
        ("regex", ["k_proj"], "m.k_proj", (), False),
        ("regex", ["re:.*experts.*"], "m.experts", ("m.experts.0.w1",), True),
        ("regex", ["re:.*w1"], "m.experts", ("m.experts.0.w1", "m.experts.0.w2"), None),
        ("regex", ["re:(a+)+$"], "m.k_proj", (), None),
        ("regex", ["re:["], "m.k_proj", (), None),
        ("exact", ["m.experts.0.w1"], "m.experts", (), True),
        ("exact", ["m.mlp"], "m.experts", (), False),
        ("exact", [5, "m.k_proj"], "m.k_proj", (), True),
    ],
)
def test_ways_to_match(match: Match, entries: list[Any], layer: str, parts: tuple[str, ...], expected: object) -> None:
    assert SkipList(entries, match).skips(layer, parts) is expected


@pytest.mark.parametrize(
    ("match", "entries"),
    [
        ("regex", ["re:" + "(a|a)" * 30 + "x"]),
        ("regex", ["re:" + ".*" * 10 + "x"]),
        ("regex", ["re:.*.*.*x"] * 50),
        ("regex", ["re:(?=(a*))*\\1x"]),
        ("substring", [str(number) for number in range(300_000)]),
        ("suffix", ["a." * 50_000]),
    ],
)
def test_no_list_takes_long(match: Match, entries: list[str]) -> None:
    layers = {"a" * 150 + str(number): () for number in range(3000)}
    start = time.process_time()
    SkipList(entries, match).judge(layers)
    assert time.process_time() - start < 4


@pytest.mark.parametrize("entries", ["lm_head", ["q_proj"], ["model.layers.0.mlp.down_proj"]])
def test_messages_call_the_list_what_the_config_calls_it(entries: object) -> None:
    findings = skip_findings(llama("o_proj"), SkipList(entries, key="ignored_layers"))
    assert findings
    for finding in findings:
        assert "ignored_layers" in finding.message
        assert "modules_to_not_convert" not in f"{finding.message} {finding.fix} {finding.offenders}"
