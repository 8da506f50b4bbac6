"""Targets, keys and kinds of layers, held against the installed compressed-tensors and vLLM."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest

from quantserve.api import Checkpoint, Linear
from quantserve_compressed_tensors.config import NAME, read_args, read_config
from quantserve_compressed_tensors.schemes import kind_of
from quantserve_compressed_tensors.targets import FUSED, Groups, Targets

pytestmark = pytest.mark.vllm

TARGETS = [
    "Linear", "linear", "Parallel", "QKV", "Expert", "RoutedExperts", "ParallelLMHead", "LlamaMLP", "RowParallelLinear",
    "lm_head", "re:.*lm_head", "re:.*", "re:.*self_attn.*", r"re:.*\.(q|k|v)_proj$", r"re:.*[qk]_proj", "re:.*qkv_proj",
    r"re:model\.layers\.1\..*", "re:.*experts.*", r"re:.*experts\.\d+\.up_proj", r"re:.*experts\.0\.(gate|up)_proj",
    "re:.*Linear", "re:Row.*", "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj",
    "model.layers.1.self_attn.v_proj", "model.layers.1.self_attn.qkv_proj", "model.layers.1.mlp.gate_proj",
    "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.2.mlp.experts.0.down_proj",
    "re:.*v_proj", "re:.*up_proj", "re:.*gate_proj", "re:.*mlp.*", "self_attn", "",
]  # fmt: skip
CLASSES = {
    "qkv_proj": "QKVParallelLinear", "o_proj": "RowParallelLinear", "gate_up_proj": "MergedColumnParallelLinear",
    "down_proj": "RowParallelLinear",
}  # fmt: skip
LAYERS = [
    (f"model.layers.{index}.{part}.{leaf}", kind)
    for index in (1, 2, 11)
    for leaf, kind in CLASSES.items()
    for part in [("self_attn" if leaf in ("qkv_proj", "o_proj") else "mlp")]
]


def parts_of(layer: str) -> list[str]:
    parent, _, leaf = layer.rpartition(".")
    return [f"{parent}.{part}" for part in FUSED.get(leaf, ())]


def test_layers_have_the_targets_that_vllm_finds() -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import find_matched_target

    fused = {layer: list(parts) for layer, parts in FUSED.items()}
    chance = random.Random(19)
    seen: Counter[str | None] = Counter()
    for _ in range(150):
        targets = chance.sample(TARGETS, chance.randint(1, 6))
        ours = Targets(targets)
        for layer, kind in [*LAYERS, ("lm_head", "ParallelLMHead")]:
            module = type(kind, (), {})()
            expected = find_matched_target(layer, module, targets, fused)
            found = ours.match(layer, parts_of(layer), kind)
            assert found == expected, (layer, targets)
            seen[found] += 1
    assert len(seen) > 15


def test_experts_have_the_targets_that_vllm_finds() -> None:
    """vLLM adds a target for their class, and asks for the linears of expert 0."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import find_matched_target

    chance = random.Random(5)
    seen = set()
    module = type("RoutedExperts", (), {})()
    for _ in range(150):
        targets = chance.sample(TARGETS, chance.randint(1, 5))
        config = CompressedTensorsConfig({target: target for target in targets}, [], "pack-quantized")
        config._add_fused_moe_to_target_scheme_map()
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.2.mlp.experts.0.{leaf}"
            matched = find_matched_target(name, module, config.target_scheme_map, {})
            expected = None if matched is None else config.target_scheme_map[matched]
            found = Targets(targets).match(name, (), "RoutedExperts")
            assert found == expected, (leaf, targets)
            seen.add(found)
    assert len(seen) > 8


def test_an_expert_belongs_to_what_the_first_one_does() -> None:
    values = groups({"a": {"targets": [r"re:.*experts\.0\.up_proj"]}, "b": {"targets": ["Linear"]}})
    written = read_config(Checkpoint.from_tensors({"quantization_config": values}))
    assert written is not None
    listed = tuple(f"model.layers.0.mlp.experts.{index}.up_proj" for index in range(4))
    group = Groups(written).of(Linear(listed[0], 8, 8, "column", "experts", 0, 4, listed))
    assert group is not None
    assert group.name == "a"


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
        "actorder": chance.choice([None, None, None, "static", "weight", "group", True, False]),
        "scale_dtype": chance.choice([None, "torch.uint8"]),
    }
    return {key: value for key, value in made.items() if chance.random() < 0.95}


def test_arguments_are_read_as_compressed_tensors_reads_them() -> None:
    from compressed_tensors.quantization import QuantizationArgs  # type: ignore[import-untyped]
    from pydantic import ValidationError

    chance = random.Random(7)
    seen: Counter[bool] = Counter()
    for _ in range(800):
        values = some_args(chance)
        try:
            theirs: Any = QuantizationArgs.model_validate(values)
        except (ValidationError, NotImplementedError):
            theirs = None
        try:
            ours: Any = read_args(values)
        except ValueError:
            ours = None
        assert (ours is None) == (theirs is None), (values, ours, theirs)
        seen[ours is None] += 1
        if ours is None:
            continue
        expected = (theirs.num_bits, theirs.type, theirs.symmetric, theirs.strategy, bool(theirs.dynamic))
        assert (ours.bits, ours.type, ours.symmetric, ours.strategy, ours.dynamic) == expected
        assert ours.group_size == (theirs.group_size if theirs.group_size != -1 else None)
        assert (list(ours.block) if ours.block else None) == theirs.block_structure
        order = {"group": "group", "dynamic": "group", "weight": "weight", "static": "weight", None: ""}
        assert ours.order == order[theirs.actorder]
    assert min(seen.values()) > 100


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
        values = groups({"g": entry}, form)
        expected = made_by_vllm(config_class, values)
        written = read_config(Checkpoint.from_tensors({"quantization_config": values}))
        assert written is not None
        kind = kind_of(written.groups[0]) if written.groups else None
        assert (kind.vllm if kind else "") == expected, json.dumps(values)
        seen[expected] += 1
    assert {name for name, count in seen.items() if count > 5} >= {
        "", "CompressedTensorsWNA16", "CompressedTensorsW8A8Int8", "CompressedTensorsW8A8Fp8",
        "CompressedTensorsW4A4Fp4", "CompressedTensorsW4A4Mxfp4", "CompressedTensorsW4A8Int",
    }  # fmt: skip


def made_by_vllm(config_class: Any, values: dict[str, Any]) -> str:
    """The name of the class that vLLM makes of the first group; "" where it stops."""
    try:
        made = config_class.from_config({**values, "config_groups": dict(values["config_groups"])})
        scheme = made.get_scheme(type("ColumnParallelLinear", (), {})(), "model.layers.0.mlp.up")
    except Exception:  # of whatever kind: assertions, attributes of None, ValueError, NotImplementedError
        return ""
    return type(scheme).__name__.replace("W8A16Fp8", "W8A8Fp8")
