"""The experts of a mixture: one linear for all that are alike, listed or stacked, and what follows from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import Spec
from quantserve.api import Checkpoint, E, Finding, K, Linear, N, Part, Scheme, SkipList, linears, quantizable
from quantserve.checks.memory import weights_per_rank
from quantserve.checks.scheme import check_schemes
from quantserve.checks.stored import stored_linears
from quantserve.checks.tensors import check_tensors
from quantserve.model.linear import shard_k, shard_n
from quantserve.model.modules import modules, undescribed

EXPERTS = 4
HIDDEN, WIDTH = 256, 128
QWEN: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": HIDDEN, "vocab_size": 512,
    "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 64, "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH,
    "mlp_only_layers": [0],
}  # fmt: skip
# Families whose tensor names the core does not know.
DEEPSEEK: dict[str, Any] = {
    **QWEN, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "n_routed_experts": EXPERTS,
    "first_k_dense_replace": 1,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    **QWEN, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_local_experts": EXPERTS,
    "intermediate_size": WIDTH,
}  # fmt: skip
LAYER = "model.layers.1.mlp"
SIZES = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
STACKS = {"gate_up_proj": (2 * WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}

INT4 = Scheme(
    {"qweight": Part((K(), N(8)), ("I32",)), "scales": Part((K(32), N()), ("F16",))},
    bits=4,
    group_size=32,
)
MXFP4 = Scheme(
    {"blocks": Part((N(), K(32), 16), ("U8",)), "scales": Part((N(), K(32)), ("U8",))},
    bits=4,
    group_size=32,
)


def stored(scheme: Scheme, name: str, n: int, k: int, experts: int = 0, between: str = ".") -> dict[str, Spec]:
    parts = scheme.stacked() if experts else scheme
    found: dict[str, Spec] = {}
    for suffix in parts.parts:
        part = parts.alternatives(suffix)[0]
        found[f"{name}{between}{suffix}"] = (part.dtypes[0], tuple(size or 0 for size in part.sizes(n, k, experts)))
    return found


def listed(scheme: Scheme, plain: Callable[[str], bool] = lambda name: False) -> dict[str, Spec]:
    """Four experts with tensors of their own, and a shared one."""
    tensors: dict[str, Spec] = {}
    for leaf, (n, k) in SIZES.items():
        names = [f"{LAYER}.experts.{expert}.{leaf}" for expert in range(EXPERTS)]
        for name in [*names, f"{LAYER}.shared_experts.{leaf}"]:
            tensors |= {f"{name}.weight": ("BF16", (n, k))} if plain(name) else stored(scheme, name, n, k)
    return {**tensors, f"{LAYER}.gate.weight": ("BF16", (EXPERTS, HIDDEN))}


def qwen(scheme: Scheme, **changes: Spec) -> dict[str, Spec]:
    """A Qwen3-MoE whose second layer has experts; the other linears are plain."""
    tensors: dict[str, Spec] = {
        f"{linear.name}.weight": ("BF16", (linear.n, linear.k))
        for linear in linears(of({}, QWEN))
        if linear.fused != "experts"
    }
    experts = {name: spec for name, spec in listed(scheme).items() if "shared" not in name}
    return {**tensors, **experts, **changes}


def stacked(scheme: Scheme | None, transposed: bool = False) -> dict[str, Spec]:
    """Four experts in one tensor each, as gpt-oss stores them."""
    tensors: dict[str, Spec] = {f"{LAYER}.router.weight": ("BF16", (EXPERTS, HIDDEN))}
    for leaf, (n, k) in STACKS.items():
        name = f"{LAYER}.experts.{leaf}"
        if scheme is None:
            tensors[name] = ("BF16", (EXPERTS, k, n) if transposed else (EXPERTS, n, k))
        else:
            tensors |= stored(scheme, name, n, k, EXPERTS, "_")
        tensors[f"{name}_bias"] = ("BF16", (EXPERTS, n))
    return tensors


def of(tensors: Mapping[str, Spec], config: Mapping[str, Any]) -> Checkpoint:
    every: dict[str, Any] = dict(tensors)
    return Checkpoint.from_tensors(config, every)


def check(checkpoint: Checkpoint, scheme: Scheme, **options: Any) -> list[Finding]:
    def of_experts(linear: Linear) -> Scheme | None:
        return scheme if linear.fused == "experts" else None

    return check_schemes(checkpoint, stored_linears(checkpoint, of_experts), code="x", **options)


def always(scheme: Scheme) -> Callable[[Linear], Scheme]:
    return lambda linear: scheme


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


# --- one entry ------------------------------------------------------------------------------------------------


def test_listed_experts_are_one_linear_that_names_them_all() -> None:
    experts = [linear for linear in linears(of({}, QWEN)) if linear.fused == "experts"]
    assert [(one.n, one.k, one.experts, one.stacked) for one in experts] == [
        (n, k, 4, False) for n, k in SIZES.values()
    ]
    assert experts[0].names == tuple(f"{LAYER}.experts.{expert}.gate_proj" for expert in range(4))
    assert {one.group for one in experts} == {f"{LAYER}.experts"}
    assert experts[0].weights == 4 * WIDTH * HIDDEN


@pytest.mark.parametrize("scheme", [INT4, None])
def test_so_are_those_of_a_family_known_from_the_files(scheme: Scheme | None) -> None:
    """By number, and not as text: expert 2 before expert 10."""
    tensors = {
        f"{LAYER}.experts.{expert}.up_proj.{suffix}": spec
        for expert in range(12)
        for suffix, spec in (
            {"weight": ("BF16", (WIDTH, HIDDEN))} if scheme is None else {"qweight": ("I32", (HIDDEN, WIDTH // 8))}
        ).items()
    }
    checkpoint = of(tensors, DEEPSEEK)
    (linear,) = linears(checkpoint) if scheme is None else undescribed(checkpoint)
    assert (linear.experts, linear.fused, linear.parallel) == (12, "experts", "column")
    assert linear.names == tuple(f"{LAYER}.experts.{expert}.up_proj" for expert in range(12))


@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_experts_have_the_sizes_of_one(transposed: bool) -> None:
    """[e, n, k] or [e, k, n]: the hidden size tells."""
    found = {linear.name: linear for linear in linears(of(stacked(None, transposed), GPT_OSS))}
    for leaf, size in STACKS.items():
        linear = found[f"{LAYER}.experts.{leaf}"]
        assert ((linear.n, linear.k), linear.experts, linear.stacked) == (size, EXPERTS, True)
        assert linear.group == f"{LAYER}.experts"
    assert f"{LAYER}.router" not in found


def test_stacked_quantized_experts_are_solved() -> None:
    checkpoint = of(stacked(MXFP4), GPT_OSS)
    assert set(modules(checkpoint)[f"{LAYER}.experts.down_proj"]) == {"blocks", "scales", "bias"}
    quantized = stored_linears(checkpoint, lambda linear: MXFP4).quantized
    assert {one.name.rpartition(".")[2]: (one.n, one.k) for one, _ in quantized} == STACKS
    assert {one.experts for one, _ in quantized} == {EXPERTS}


def test_shared_experts_and_routers_are_no_experts() -> None:
    found = linears(of(listed(INT4, plain=lambda name: True), DEEPSEEK))
    assert {one.fused for one in found if "shared" in one.name} == {"gate_up_proj", ""}
    assert not [one for one in found if one.name.endswith(".gate")]


def test_a_quantizer_gets_every_listed_expert() -> None:
    found = [one for one in quantizable(of({}, QWEN)) if one.fused == "experts"]
    assert len(found) == len({one.name for one in found}) == 3 * EXPERTS
    assert not [one for one in quantizable(of(stacked(None), GPT_OSS)) if one.fused == "experts"]


# --- findings -------------------------------------------------------------------------------------------------

CASES = [
    pytest.param(qwen(INT4), QWEN, id="described"),
    pytest.param(listed(INT4), DEEPSEEK, id="undescribed"),
]


@pytest.mark.parametrize(("tensors", "config"), CASES)
def test_a_finding_names_the_expert(tensors: dict[str, Spec], config: dict[str, Any]) -> None:
    assert check(of(tensors, config), INT4) == []
    damaged = f"{LAYER}.experts.2.down_proj"
    missing = {name: spec for name, spec in tensors.items() if name != f"{damaged}.scales"}
    assert only(check(of(missing, config), INT4)).offenders == (f"{damaged}.scales",)
    wrong = {**tensors, f"{damaged}.qweight": ("I32", (HIDDEN, 32))}
    assert only(check(of(wrong, config), INT4)).offenders == (f"{damaged}.qweight [256, 32], expected [128, 32]",)
    typed = {**tensors, f"{damaged}.scales": ("F32", (4, HIDDEN))}
    assert only(check(of(typed, config), INT4)).offenders == (f"{damaged}.scales F32, expected F16",)
    extra = {**tensors, f"{damaged}.g_idx": ("I32", (WIDTH,))}
    assert only(check(of(extra, config), INT4)).offenders == (f"{damaged}.g_idx [128]",)


@pytest.mark.parametrize(("tensors", "config"), CASES)
def test_what_is_wrong_with_all_experts_is_said_once(tensors: dict[str, Spec], config: dict[str, Any]) -> None:
    wrong = {n: ("F32", s[1]) if ".experts." in n and n.endswith("down_proj.scales") else s for n, s in tensors.items()}
    finding = only(check(of(wrong, config), INT4))
    assert finding.offenders == (f"{LAYER}.experts.0.down_proj.scales F32, expected F16 (and 3 more experts)",)
    assert finding.message.startswith("4 tensors have the wrong dtype")


@pytest.mark.parametrize(("tensors", "config"), CASES)
def test_a_plain_expert_among_quantized_ones(tensors: dict[str, Spec], config: dict[str, Any]) -> None:
    odd = f"{LAYER}.experts.3.up_proj"
    mixed: dict[str, Spec] = {name: spec for name, spec in tensors.items() if not name.startswith(odd)}
    mixed[f"{odd}.weight"] = ("BF16", (WIDTH, HIDDEN))
    finding = only(check(of(mixed, config), INT4))
    assert finding.code == "x-partly-quantized"
    assert finding.offenders == (f"{LAYER}.experts: 3.up_proj unquantized, 11 other parts quantized",)


def test_stacked_experts_are_compared() -> None:
    tensors = stacked(MXFP4)
    assert check(of(tensors, GPT_OSS), MXFP4) == []
    name = f"{LAYER}.experts.down_proj_scales"
    lost = {key: spec for key, spec in tensors.items() if key != name}
    assert only(check(of(lost, GPT_OSS), MXFP4)).code == "x-missing-tensors"
    finding = only(check(of({**tensors, name: ("U8", (EXPERTS - 1, HIDDEN, 4))}, GPT_OSS), MXFP4))
    assert finding.offenders == (f"{name} [3, 256, 4], expected [4, 256, 4] or [4, 4, 256]",)


def test_plain_stacked_experts_may_be_stored_either_way() -> None:
    for transposed in (False, True):
        checkpoint = of(stacked(None, transposed), GPT_OSS)
        scheme = Scheme({"weight": Part((N(), K()), ("BF16",))}, bits=16, scales="none")
        assert check(checkpoint, scheme) == []


def test_stacked_experts_of_a_described_family() -> None:
    """vLLM loads Qwen3-MoE either way."""
    tensors = {name: spec for name, spec in qwen(INT4).items() if ".experts." not in name}
    tensors |= {f"{LAYER}.experts.{leaf}": ("BF16", (EXPERTS, n, k)) for leaf, (n, k) in STACKS.items()}
    checkpoint = of(tensors, QWEN)
    experts = {one.name: (one.n, one.k, one.experts) for one in linears(checkpoint) if one.fused == "experts"}
    assert experts == {f"{LAYER}.experts.{leaf}": (*size, EXPERTS) for leaf, size in STACKS.items()}
    plain = Scheme({"weight": Part((N(), K()), ("BF16",))}, bits=16, scales="none")
    assert check(checkpoint, plain) == []
    assert "unknown-tensors" not in {finding.code for finding in check_tensors(checkpoint)}


def test_a_scheme_may_place_the_experts_itself() -> None:
    scheme = Scheme({"blocks": Part((N(), E(), K(2)), ("U8",))}, bits=4)
    assert scheme.stacked() is scheme
    tensors: dict[str, Spec] = {f"{LAYER}.experts.down_proj_blocks": ("U8", (HIDDEN, EXPERTS, WIDTH // 2))}
    assert check(of(tensors, GPT_OSS), scheme) == []


def test_ranks_cut_experts_as_one() -> None:
    finding = only(check(of(listed(INT4), DEEPSEEK), INT4, ranks=32))
    assert finding.code == "x-word-splits-ranks"
    cut = f"{LAYER}.experts.0.gate_proj: N 128/32 = 4 is not a multiple of 8 (and 3 more experts)"
    assert finding.offenders == (cut, cut.replace("gate_proj", "up_proj"))


def test_a_skip_list_names_experts_once() -> None:
    plain = {name: spec for name, spec in qwen(INT4).items() if ".experts." not in name}
    for leaf, size in SIZES.items():
        plain |= {f"{LAYER}.experts.{expert}.{leaf}.weight": ("BF16", size) for expert in range(EXPERTS)}
    checkpoint = of(plain, QWEN)
    linear = "model.layers.0.self_attn.q_proj"
    tensors = {name: spec for name, spec in plain.items() if not name.startswith(linear)}
    checkpoint = of({**tensors, **stored(INT4, linear, 256, 256)}, QWEN)
    found = check_schemes(
        checkpoint, stored_linears(checkpoint, lambda linear: INT4), code="x", skip=SkipList(["self_attn", "mlp.gate"])
    )
    offenders = [one for finding in found for one in finding.offenders if ".experts." in one]
    assert offenders == [f"{LAYER}.experts.0.{leaf} (and 3 more experts)" for leaf in SIZES]


# --- bytes ----------------------------------------------------------------------------------------------------


def test_ranks_keep_what_the_scheme_says_of_experts() -> None:
    """Codes and scales of row-parallel linears are cut along K; a scale of the whole tensor is on every rank."""
    for tensors, config, scheme in ((listed(INT4), DEEPSEEK, INT4), (stacked(MXFP4), GPT_OSS, MXFP4)):
        experts = {name: spec for name, spec in tensors.items() if ".experts." in name and "bias" not in name}
        checkpoint = of(experts, config)
        made = stored_linears(checkpoint, always(scheme))
        whole = weights_per_rank(checkpoint, 1, 2, made)
        assert whole == checkpoint.weight_bytes
        assert weights_per_rank(checkpoint, 2, 2, made) == whole // 2


def test_what_the_engine_keeps_may_be_more_than_is_stored() -> None:
    scheme = Scheme(INT4.parts, bits=4, group_size=32, kept=16)
    tensors = {name: spec for name, spec in listed(INT4).items() if ".experts." in name}
    for ranks in (1, 2):
        checkpoint = of(tensors, DEEPSEEK)
        made = stored_linears(checkpoint, lambda linear: scheme)
        assert weights_per_rank(checkpoint, ranks, 2, made) == 3 * EXPERTS * WIDTH * HIDDEN * 2 // ranks


MIXTRAL: dict[str, Any] = {
    **QWEN, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": EXPERTS,
    "intermediate_size": WIDTH,
}  # fmt: skip


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        pytest.param(MIXTRAL, {}, id="mixtral"),
        pytest.param(QWEN, {}, id="qwen3_moe"),
        pytest.param(GPT_OSS, stacked(None, True), id="gpt_oss"),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_vllm_builds_experts_of_these_sizes(
    config: dict[str, Any], tensors: dict[str, Spec], ranks: int, tmp_path: Path
) -> None:
    """Its parameters on the meta device have as many weights as the linears on one rank."""
    from corpus import truth

    (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16", "hidden_act": "silu"}))
    model, _ = truth.make(tmp_path, ranks)
    layer = model.model.layers[1]
    made = sum(
        parameter.numel()
        for name, parameter in layer.named_parameters()
        if ".experts." in name and name.endswith("_weight")
    )
    experts = [one for one in linears(of(tensors, config)) if one.fused == "experts" and ".layers.1." in one.name]
    assert made == sum(shard_n(one, ranks) * shard_k(one, ranks) * one.experts for one in experts) > 0
