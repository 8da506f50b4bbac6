"""Skip lists and routers held against the installed vLLM: its own functions, and the source of its models."""

from __future__ import annotations

import ast
import functools
import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantserve.api import K, N, Part, Scheme
from quantserve.checkpoint import Checkpoint
from quantserve.checks.fused import ROUTERS_OF_THE_METHOD
from quantserve.checks.scheme import check_schemes
from quantserve.checks.skipped import Match, SkipList
from quantserve.checks.stored import stored_linears
from quantserve.finding import Finding
from quantserve.model.layers import is_router, linears
from quantserve.model.modules import engine_layers

pytestmark = pytest.mark.vllm

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
}
MODULES = (
    "self_attn.qkv_proj", "self_attn.o_proj", "self_attn.fused_qkv_a_proj", "mlp.gate_up_proj", "mlp.down_proj",
    "mlp.gate", "mlp.experts", "mlp.shared_experts.gate_up_proj", "mlp.shared_experts.down_proj",
)  # fmt: skip
LAYERS = [f"model.layers.{index}.{module}" for index in (0, 1, 10, 11) for module in MODULES]
ENTRIES = [
    "lm_head", "gate", "mlp.gate", "q_proj", "k_proj", "v_proj", "o_proj", "self_attn", "self_attn.qkv_proj", "experts",
    "mlp.experts", "shared_experts", "model.layers.0.", "model.layers.1", "model.layers.0.mlp.experts", "up_proj",
    "model.layers.0.mlp.experts.0.gate_proj", "model.layers.1.mlp.shared_experts.down_proj", "kv_a_proj_with_mqa", "",
    "model.layers.10.self_attn.q_proj", "model.layers.10.self_attn.k_proj", "model.layers.10.self_attn.v_proj",
    "model.layers.11.mlp.gate_proj", "model.layers.11.mlp.up_proj", "model.layers.11.mlp.gate_up_proj", "gate_up_proj",
    "q_a_proj", "a_proj", "model.layers.1.mlp.gate", "model", "re:.*", "re:.*self_attn.*", r"re:.*\.(q|k|v)_proj$",
    "re:.*mlp.gate$", r"re:model\.layers\.1\..*", "re:.*experts.*", r"re:.*experts\.\d+\.up_proj",
]  # fmt: skip


def parts(layer: str) -> list[str]:
    parent, _, leaf = layer.rpartition(".")
    if leaf == "experts":
        return [f"{layer}.{i}.{part}" for i in (0, 1) for part in ("gate_proj", "up_proj", "down_proj")]
    return [f"{parent}.{part}" for part in FUSED.get(leaf, ())]


def judged(function: Callable[[], bool]) -> bool | None:
    try:
        return function()
    except ValueError:
        return None


@pytest.mark.parametrize("match", ["substring", "exact", "suffix", "regex"])
def test_layers_are_skipped_as_vllm_skips_them(match: Match) -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    def in_vllm(layer: str, entries: list[str]) -> bool | None:
        if match != "regex":
            return judged(lambda: is_layer_skipped(layer, entries, FUSED, match_mode=match))
        if not layer.endswith(".experts"):
            return judged(lambda: should_ignore_layer(layer, entries, FUSED))
        # CompressedTensorsMoEMethod asks for the projections of expert 0, which must agree.
        answers = {bool(should_ignore_layer(part, entries)) for part in parts(layer)[:3]}
        return answers.pop() if len(answers) == 1 else None

    chance = random.Random(match)
    seen: set[bool | None] = set()
    for _ in range(2000):
        entries = chance.sample(ENTRIES, chance.randint(1, 4))
        skip = SkipList(entries, match)
        for layer in LAYERS:
            expected = in_vllm(layer, entries)
            if match == "regex" and layer.endswith(".experts") and layer in entries:
                continue  # vLLM does not ask for the layer's own name there
            assert skip.skips(layer, parts(layer)) is expected, (layer, entries)
            seen.add(expected)
    assert seen == {True, False, None}


def test_files_that_hold_what_vllm_builds_have_no_findings() -> None:
    """Random lists; the files hold each layer as vLLM builds it. Then one layer is stored the other way."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    layers = engine_layers(Checkpoint.from_tensors(LLAMA))
    pick = random.Random(5)
    judged = found = 0
    for _ in range(300):
        entries = pick.sample([entry for entry in ENTRIES if not entry.startswith("re:")], pick.randint(1, 4))
        try:
            plain = {layer for layer in layers if is_layer_skipped(layer, entries, FUSED, match_mode="substring")}
        except ValueError:
            continue
        judged += 1
        assert skip_findings(plain, entries) == []
        other = pick.choice(list(layers))
        (finding,) = skip_findings(plain ^ {other}, entries)
        part = next(iter(layers[other] or (other,)))
        assert finding.offenders[0] == part
        found += ("unquantized in the files" in finding.message) is (other not in plain)
    assert judged > 100
    assert found == judged


def skip_findings(plain: set[str], entries: list[str]) -> list[Finding]:
    """The findings about a list where the linears of these layers are stored plain."""
    tensors: dict[str, Any] = {}
    for linear in linears(Checkpoint.from_tensors(LLAMA)):
        if linear.group in plain:
            tensors[f"{linear.name}.weight"] = ("F16", (linear.n, linear.k))
        else:
            tensors[f"{linear.name}.codes"] = ("I8", (linear.n, linear.k))
    scheme = Scheme({"codes": Part((N(), K()), ("I8",))}, bits=8)
    checkpoint = Checkpoint.from_tensors(LLAMA, tensors)
    return check_schemes(
        checkpoint, stored_linears(checkpoint, lambda linear: scheme), code="x", skip=SkipList(entries)
    )


# --- the source of vLLM's models ---------------------------------------------------------------------------------


@functools.cache
def made_linears() -> tuple[tuple[str, str, str, bool], ...]:
    """File, class, last part of the module's name and whether it has the method, of every linear vLLM's models make."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    made = []
    for file in sorted(Path(spec.origin).parent.glob("model_executor/models/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or "Linear" not in node.func.id:
                continue
            keys = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            leaf = keys.get("prefix", "").rpartition("}.")[2].strip("\"'")
            made.append((file.stem, node.func.id, leaf, keys.get("quant_config", "None") != "None"))
    return tuple(made)


def test_routers_of_vllms_models() -> None:
    """A mixture's router has a name of ours, and the models that build it with the method are those we know."""
    routers = [made for made in made_linears() if made[1] == "GateLinear" and made[2]]
    assert len(routers) > 30
    paths = {"proj": "router.proj", "classifier": "router.classifier"}
    unknown = {(file, leaf) for file, _, leaf, _ in routers if not is_router("layers.0.mlp." + paths.get(leaf, leaf))}
    assert unknown == set()
    with_method = {file for file, _, _, method in routers if method}
    assert with_method == {"qwen3_moe", "lfm2_moe", "k2_horizon"}
    stems = {name.lower().partition("for")[0].replace("vl", "").replace("omni", "") for name in ROUTERS_OF_THE_METHOD}
    assert stems == {name.replace("_", "") for name in with_method}


def test_gates_of_shared_experts_are_never_quantized() -> None:
    gates = [made for made in made_linears() if made[2] == "shared_expert_gate"]
    assert gates
    assert not any(method for *_, method in gates)
    assert is_router("model.layers.0.mlp.shared_expert_gate")


def test_what_decoders_fuse() -> None:
    """No decoder of vLLM's own builds k_proj, or gate_proj and up_proj, as layers of their own, but for Laguna."""
    made: dict[str, set[str]] = {}
    for file, _, leaf, method in made_linears():
        if method:
            made.setdefault(file, set()).add(leaf)
    apart: dict[str, Any] = {
        "k": {file for file, leaves in made.items() if "k_proj" in leaves},
        "gate": {file for file, leaves in made.items() if {"gate_proj", "up_proj"} <= leaves},
    }
    assert apart == {"k": {"gemma4_dspark", "moss_audio"}, "gate": {"laguna"}}
