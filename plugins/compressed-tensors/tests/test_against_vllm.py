"""Targets, keys and kinds of layers, held against the installed compressed-tensors and vLLM."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest

from quantserve_compressed_tensors.config import NAME, read_args, read_config
from quantserve_compressed_tensors.schemes import kind_of

pytestmark = pytest.mark.vllm

TARGETS = [
    "Linear", "linear", "ParallelLMHead", "lm_head", "re:.*lm_head", "re:.*", "re:.*self_attn.*",
    r"re:.*\.(q|k|v)_proj$", "re:.*[qk]_proj", "re:.*qkv_proj", r"re:model\.layers\.1\..*", "re:.*Linear",
    "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj",
    "model.layers.1.self_attn.qkv_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj",
    "model.layers.1.mlp.down_proj", "re:.*experts.*", r"re:.*experts\.\d+\.up_proj", "re:.*v_proj", "re:.*up_proj",
    "re:.*gate_proj", "re:.*mlp.*", "self_attn", "",
]  # fmt: skip
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
LAYERS = {
    f"model.layers.{index}.{layer}": kind
    for index in (1, 2)
    for layer, kind in (
        ("self_attn.qkv_proj", "QKVParallelLinear"), ("self_attn.o_proj", "RowParallelLinear"),
        ("mlp.gate_up_proj", "MergedColumnParallelLinear"), ("mlp.down_proj", "RowParallelLinear"),
    )
} | {"lm_head": "ParallelLMHead"}  # fmt: skip


def test_layers_have_the_targets_that_vllm_finds() -> None:
    """Where vLLM's rule for a fused layer and ours for its parts differ, the parts belong to different groups."""
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import find_matched_target

    fused = {layer: list(parts) for layer, parts in FUSED.items()}
    chance = random.Random(19)
    seen: Counter[str | None] = Counter()
    mixed = 0
    for _ in range(200):
        targets = chance.sample(TARGETS, chance.randint(1, 6))
        config = read_config(groups({target or "none": {"targets": [target]} for target in targets}))
        for layer, kind in LAYERS.items():
            expected = find_matched_target(layer, type(kind, (), {})(), targets, fused)
            parent, _, leaf = layer.rpartition(".")
            parts = [(f"{parent}.{part}", layer) for part in FUSED.get(leaf, ())] or [(layer, "")]
            found = {group and group.targets[0] for group in (config.of(*part) for part in parts)}
            mixed += len(found) > 1
            assert len(found) > 1 or found == {expected}, (layer, targets)
            seen[expected] += 1
    assert len(seen) > 12
    assert 0 < mixed < 200


def test_experts_have_the_targets_that_vllm_finds() -> None:
    """vLLM adds a target for their class, and asks for the linears of expert 0."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import find_matched_target

    chance = random.Random(5)
    seen = set()
    known = [target for target in TARGETS if target not in ("", "linear", "re:.*Linear", "ParallelLMHead")]
    for _ in range(150):
        targets = chance.sample(known, chance.randint(1, 5))
        theirs = CompressedTensorsConfig({target: target for target in targets}, [], "pack-quantized")
        theirs._add_fused_moe_to_target_scheme_map()
        ours = read_config(groups({target: {"targets": [target]} for target in targets}))
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.2.mlp.experts.0.{leaf}"
            matched = find_matched_target(name, type("RoutedExperts", (), {})(), theirs.target_scheme_map, {})
            group = ours.of(name)
            expected = None if matched is None else theirs.target_scheme_map[matched]
            assert (group.targets[0] if group else None) == expected, (leaf, targets)
            seen.add(expected)
    assert len(seen) > 6


def groups(entries: dict[str, dict[str, Any]], form: str = "pack-quantized") -> dict[str, Any]:
    """A quantization config; groups are W4A16 unless they say otherwise."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    made = {name: {"weights": weights, **entry} for name, entry in entries.items()}
    return {"quant_method": NAME, "format": form, "config_groups": made}


# --- keys and kinds ----------------------------------------------------------------------------------------------

FORMATS = [
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "dense", "mixed-precision",
]  # fmt: skip

FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
TOKENS = {"num_bits": 8, "strategy": "token", "dynamic": True}
TYPICAL: list[tuple[dict[str, Any], dict[str, Any] | None, str]] = [
    (FP4, {**FP4, "dynamic": "local"}, "nvfp4-pack-quantized"),
    (FP4, None, "nvfp4-pack-quantized"),
    ({**FP4, "strategy": "group", "group_size": 32}, None, "mxfp4-pack-quantized"),
    ({"num_bits": 8, "strategy": "channel"}, TOKENS, "int-quantized"),
    ({"num_bits": 8, "strategy": "tensor"}, {"num_bits": 8, "strategy": "tensor"}, "int-quantized"),
    ({"num_bits": 4, "strategy": "group", "group_size": 128}, TOKENS, "int-quantized"),
    ({"num_bits": 8, "type": "float", "strategy": "channel"}, {**TOKENS, "type": "float"}, "float-quantized"),
    ({"num_bits": 4, "strategy": "group", "group_size": 128}, None, "pack-quantized"),
]
"""Weights, activations and format of what llm-compressor's recipes write."""


def some_args(chance: random.Random) -> dict[str, Any]:
    """Arguments of values, some of them wrong."""
    strategy = chance.choice(["tensor", "channel", "group", "block", "token", "tensor_group", None])
    group = chance.choice([None, -1, 16, 32, 128]) if strategy is None or chance.random() < 0.1 else None
    if strategy in ("group", "tensor_group") and chance.random() < 0.95:
        group = chance.choice([16, 32, 128])
    block = [128, 128] if (strategy == "block") != (chance.random() < 0.05) else None
    dynamic = chance.choice([True, False, False, "local"]) if strategy != "token" or chance.random() < 0.1 else True
    made = {
        "num_bits": chance.choice([2, 3, 4, 4, 8, 8, 8, 16]),
        "type": chance.choice(["int", "INT", "float", "float"]),
        "symmetric": chance.random() < 0.8,
        "strategy": strategy,
        "group_size": group,
        "block_structure": block,
        "dynamic": dynamic,
        "actorder": chance.choice([None, None, "static", "weight"]),
        "scale_dtype": chance.choice([None, "torch.uint8"]),
    }
    return {key: value for key, value in made.items() if chance.random() < 0.95}


def accepted(values: dict[str, Any]) -> Any:
    """What compressed-tensors makes of arguments; None where it refuses them."""
    from compressed_tensors.quantization import QuantizationArgs  # type: ignore[import-untyped]

    try:
        return QuantizationArgs.model_validate(values)
    except (ValueError, NotImplementedError):
        return None


def test_arguments_are_read_as_compressed_tensors_reads_them() -> None:
    chance = random.Random(7)
    seen = 0
    for _ in range(400):
        values = {**some_args(chance), "actorder": chance.choice([None, "static", "group", True, False])}
        theirs = accepted(values)
        if theirs is None:
            continue
        ours = read_args(values)
        expected = (theirs.num_bits, theirs.type, theirs.symmetric, theirs.strategy, bool(theirs.dynamic))
        assert (ours.bits, ours.type, ours.symmetric, ours.strategy, ours.dynamic) == expected
        assert ours.group_size == (theirs.group_size if theirs.group_size != -1 else None)
        assert (list(ours.block) if ours.block else None) == theirs.block_structure
        assert ours.act_order == (theirs.actorder in ("group", "dynamic"))
        seen += 1
    assert seen > 100


def test_groups_become_the_kinds_of_layers_that_vllm_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors as theirs

    config_class = theirs.CompressedTensorsConfig
    # These choose a kernel of the device as soon as they are made; here only which of them is made counts.
    for name in ("W4A4Fp4", "W4A4Mxfp4", "W4A8Mxfp4", "W8A8Mxfp8", "W8A8Fp8", "W8A16Fp8", "W4A8Fp8"):
        stub = type(f"CompressedTensors{name}", (), {"__init__": lambda self, *args, **kwargs: None})
        stub.get_min_capability = classmethod(lambda cls: 0)  # type: ignore[attr-defined]
        monkeypatch.setattr(theirs, stub.__name__, stub)
    monkeypatch.setattr(
        config_class, "_is_fp8_w4a8_sm90", staticmethod(config_class._is_fp8_w4a8)
    )  # as on a Hopper GPU

    chance = random.Random(3)
    seen: Counter[str] = Counter()
    for _ in range(2500):
        entry: dict[str, Any] = {"targets": ["Linear"], "weights": some_args(chance)}
        form = chance.choice(FORMATS)
        if chance.random() < 0.6:
            entry["input_activations"] = some_args(chance)
        if chance.random() < 0.1:
            entry["output_activations"] = some_args(chance)
        if chance.random() < 0.3:
            entry["format"] = chance.choice(FORMATS)
        if chance.random() < 0.4:  # few arguments drawn one by one are those of a kind
            weights, inputs, form = chance.choice(TYPICAL)
            entry = {"targets": ["Linear"], "weights": dict(weights), "input_activations": inputs and dict(inputs)}
            if chance.random() < 0.4:
                changed = entry[chance.choice(["weights", "input_activations"])] or entry["weights"]
                changed |= dict([chance.choice([*some_args(chance).items(), ("num_bits", 8)])])
        every = [entry[key] for key in entry if key.endswith(("weights", "activations")) and entry[key]]
        if None in map(accepted, every):
            continue
        values = groups({"g": entry}, form)
        expected = made_by_vllm(config_class, values)
        written = read_config(values)
        kind = kind_of(written.groups[0]) if written.groups else None
        assert (kind.name if kind else "") == expected, json.dumps(values)
        seen[expected] += 1
    common = {"", "W4A16", "W8A16", "W8A8", "FP8", "NVFP4", "MXFP4", "W4A8"}
    assert {name for name, count in seen.items() if count > 5} >= common


NAMES = {
    "W4A4Fp4": "NVFP4", "W4A4Mxfp4": "MXFP4", "W4A8Mxfp4": "MXFP4", "W8A8Mxfp8": "MXFP8", "W8A8Fp8": "FP8",
    "W8A16Fp8": "FP8", "W8A8Int8": "W8A8", "W4A8Int": "W4A8", "W4A8Fp8": "W4A8 (FP8 activations)",
}  # fmt: skip
"""What this project calls vLLM's classes, without what all of them begin with."""


def made_by_vllm(config_class: Any, values: dict[str, Any]) -> str:
    """The name of what vLLM makes of the first group; "" where it stops."""
    bits = values["config_groups"]["g"]["weights"].get("num_bits", 8)
    try:
        made = config_class.from_config({**values, "config_groups": dict(values["config_groups"])})
        scheme = made.get_scheme(type("ColumnParallelLinear", (), {})(), "model.layers.0.mlp.up")
    except Exception:  # of whatever kind: assertions, attributes of None, ValueError, NotImplementedError
        return ""
    name = type(scheme).__name__.removeprefix("CompressedTensors")
    return NAMES.get(name) or name.replace("WN", f"W{bits}").removesuffix("Int")
