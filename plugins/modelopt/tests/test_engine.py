"""ModelOpt through vLLM's layers and an engine on a CPU: files of the tool against its own numbers and transformers."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")
pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.modelopt import (
    ModelOptFp8Config,
    ModelOptMixedPrecisionConfig,
    ModelOptMxFp8Config,
    ModelOptNvFp4Config,
)

import quantserve_modelopt
from helpers.engines import compare, generate
from helpers.plain import write_plain
from helpers.vllm_layers import FUSED, become, engine, load
from quantserve.api import SkipList
from quantserve_modelopt.format import ARGUMENTS, MIXED, read

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's own methods serve GPUs"),
]
DATA = Path(__file__).parent / "data"
FILES = ("fp8", "fp8-channel", "fp8-block", "mxfp8", "nvfp4", "w4a16", "mixed")
LAYER = "model.layers.0"
QKV, DOWN = f"{LAYER}.self_attn.qkv_proj", f"{LAYER}.mlp.down_proj"
Tensors = dict[str, Tensor]


_engine = engine(quantserve_modelopt.register, VLLM_PLUGINS="modelopt")


# --- a second implementation of the format, in float64 -----------------------------------------------------------


def dequantized(tensors: Tensors, module: str) -> Tensor:
    """W [n, k] of a module, from the definitions of OCP's Microscaling Formats 1.0 and of the tool's scales."""
    weight, scale = tensors[f"{module}.weight"], tensors.get(f"{module}.weight_scale")
    if scale is None:
        return weight.double()
    if weight.dtype == torch.uint8:
        codes = torch.stack((weight % 16, weight // 16), dim=2).flatten(1).long()
        exponent, mantissa = codes // 2 % 4, codes % 2
        size = torch.where(exponent > 0, (2.0 ** (exponent - 1)) * (1 + mantissa / 2), mantissa / 2)
        values = size * torch.where(codes < 8, 1.0, -1.0)
        steps = scale.double() * tensors[f"{module}.weight_scale_2"].double()
        return values * steps.repeat_interleave(codes.shape[1] // steps.shape[1], 1)
    values = weight.double()
    if scale.dtype == torch.uint8:
        return values * (2.0 ** (scale.double() - 127)).repeat_interleave(32, 1)
    if scale.ndim == 4:
        blocks = scale.double()[:, 0, :, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)
        return values * blocks[: values.shape[0], : values.shape[1]]
    return values * (scale.double()[:, None] if scale.ndim == 1 else scale.double())


def file(name: str | Path) -> Tensors:
    return dict(load_file(DATA / name / "model.safetensors"))


@pytest.mark.parametrize("name", [*FILES, "qwen3-moe"])
def test_the_second_implementation_reads_what_the_tool_reads(name: str) -> None:
    tensors, rounded = file(name), load_file(DATA / "rounded" / f"{name}.safetensors")
    assert len(rounded) >= 7
    for key, rows in rounded.items():
        ours = dequantized(tensors, key.removesuffix(".weight"))[: len(rows)]
        assert torch.allclose(ours, rows.double(), rtol=1e-6, atol=0), key


# --- layers ------------------------------------------------------------------------------------------------------


def config_of(name: str, **changes: Any) -> Any:
    """The quantization config that the engine makes of a folder."""
    config = json.loads((DATA / name / "config.json").read_text()).get("quantization_config")
    config = config or json.loads((DATA / name / "hf_quant_config.json").read_text())
    made = get_quantization_config("modelopt").from_config({**config, **changes})
    made.packed_modules_mapping = FUSED
    return made


def part(tensors: Tensors, module: str, *, without: str = "") -> Tensors:
    """The tensors of a module by suffix, scales of the KV cache apart."""
    own = {key[len(module) + 1 :]: one for key, one in tensors.items() if key.startswith(f"{module}.")}
    return {key: one for key, one in own.items() if key not in ("k_scale", "v_scale", without)}


def qkv(name: str, tensors: Tensors, ranks: int = 1) -> tuple[Any, Tensor]:
    """vLLM's fused layer of the first attention, and W of all its parts."""
    sizes = [tensors[f"{LAYER}.self_attn.{one}_proj.weight"].shape[0] for one in "qkv"]
    layer = linear.QKVParallelLinear(
        128, 64, sizes[0] // 64, sizes[1] // 64, bias=False, quant_config=config_of(name), prefix=QKV
    )
    load(layer, {one: part(tensors, f"{LAYER}.self_attn.{one}_proj") for one in "qkv"})
    return layer, torch.cat([dequantized(tensors, f"{LAYER}.self_attn.{one}_proj") for one in "qkv"])


def close(layer: Any, weight: Tensor) -> None:
    """The layer multiplies with this weight."""
    x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(1))
    found = layer.quant_method.apply(layer, x).double()
    expected = x.double() @ weight.t()
    assert (found - expected).norm() < 4e-3 * expected.norm()
    assert float((found - expected).abs().max()) < 2e-2 * float(expected.abs().max())


@pytest.mark.parametrize("name", FILES)
def test_layers_multiply_with_the_weights_of_the_tool(name: str) -> None:
    tensors = file(name)
    close(*qkv(name, tensors))
    down = linear.RowParallelLinear(256, 128, bias=False, quant_config=config_of(name), prefix=DOWN)
    close(load(down, {None: part(tensors, DOWN)}), dequantized(tensors, DOWN))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", FILES)
def test_one_of_two_ranks_gets_its_part(name: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    become(monkeypatch, rank, 2)
    tensors = file(name)
    down = linear.RowParallelLinear(256, 128, bias=False, quant_config=config_of(name), prefix=DOWN)
    mine = dequantized(tensors, DOWN)[:, 128 * rank : 128 * rank + 128]
    close(load(down, {None: part(tensors, DOWN)}), mine)
    layer, whole = qkv(name, tensors)
    parts = whole.split([tensors[f"{LAYER}.self_attn.{one}_proj.weight"].shape[0] for one in "qkv"])
    close(layer, torch.cat([one.chunk(2)[rank] for one in parts]))


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_each_part_of_a_fused_layer_keeps_its_scale(name: str) -> None:
    tensors = file(name)
    for factor, one in zip((0.5, 1.0, 3.0), "qkv", strict=True):
        scale = "weight_scale_2" if name == "nvfp4" else "weight_scale"
        tensors[f"{LAYER}.self_attn.{one}_proj.{scale}"] = tensors[f"{LAYER}.self_attn.{one}_proj.{scale}"] * factor
    close(*qkv(name, tensors))


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("nvfp4", "weight_scale_2"), ("nvfp4", "weight_scale"), ("fp8", "weight_scale"), ("mxfp8", "weight_scale")],
)
def test_a_scale_that_never_arrives(name: str, suffix: str) -> None:
    down = linear.RowParallelLinear(256, 128, bias=False, quant_config=config_of(name), prefix=DOWN)
    with pytest.raises(ValueError, match=rf"lacks {DOWN}\.{suffix}"):
        load(down, {None: part(file(name), DOWN, without=suffix)})


@pytest.mark.parametrize(("name", "octet"), [("nvfp4", 0x7F), ("mxfp8", 0xFF), ("fp8", 0x7F)])
def test_nan_is_refused_with_the_layers_name(name: str, octet: int) -> None:
    tensors = part(file(name), DOWN)
    spoiled = tensors["weight" if name == "fp8" else "weight_scale"].clone()
    spoiled.view(torch.uint8)[3, 1] = octet
    tensors["weight" if name == "fp8" else "weight_scale"] = spoiled
    down = linear.RowParallelLinear(256, 128, bias=False, quant_config=config_of(name), prefix=DOWN)
    with pytest.raises(ValueError, match=f"{DOWN}: "):
        load(down, {None: tensors})


def test_modules_of_the_list_are_unquantized() -> None:
    for entry in ("mlp", "*.mlp.*", "model.layers.0*"):
        config = config_of("nvfp4", ignore=[entry])
        layer = linear.RowParallelLinear(256, 128, bias=False, quant_config=config, prefix=DOWN)
        assert isinstance(layer.quant_method, linear.UnquantizedLinearMethod), entry


def test_a_mixture_leaves_what_it_does_not_name() -> None:
    layers = {f"{LAYER}.self_attn.o_proj": {"quant_algo": "fp8"}}
    layer = linear.RowParallelLinear(
        256, 128, bias=False, quant_config=config_of("mixed", quantized_layers=layers), prefix=DOWN
    )
    assert isinstance(layer.quant_method, linear.UnquantizedLinearMethod)


def test_engines_that_do_not_ask_keep_vllms_methods() -> None:
    from quantserve_kernels.vllm.asked import asked_for

    assert not asked_for("quantserve-modelopt:modelopt", {"VLLM_PLUGINS": "fp8"})
    ours = get_quantization_config("modelopt")
    declared = {"quant_method": "modelopt_fp4", "quant_algo": "NVFP4"}
    assert ours.override_quantization_method(declared, "modelopt") == "modelopt"
    assert ours.override_quantization_method({"quant_method": "fp8"}, "modelopt") is None


# --- settings and lists, as vLLM reads them -----------------------------------------------------------------------

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ENTRIES = [
    "lm_head", "model.layers.1", "model.layers.1.*", "model.layers.1*", "*.mlp.*", "*self_attn*", "mlp.gate", "*gate*",
    "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj",
    "model.layers.0.self_attn.q_proj*", "model.layers.2.mlp.experts.0.up_proj", "model.layers.2.mlp.experts*",
    "model.layers.[01].mlp.*", "shared_experts", "model.layers.3.mlp.shared_experts.down_proj",
]  # fmt: skip
LAYERS = [
    f"model.layers.{index}.{name}"
    for index in (0, 1, 2, 3, 10)
    for name in (
        "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", "mlp.gate", "mlp.experts",
        "mlp.shared_experts.gate_up_proj", "mlp.shared_experts.down_proj",
    )
]  # fmt: skip


def test_lists_are_matched_as_vllm_matches_them() -> None:
    chance, seen = random.Random(4), Counter[bool | None]()
    for _ in range(300):
        entries = chance.sample(ENTRIES, chance.randint(1, 4))
        config = ModelOptFp8Config("FP8", True, None, entries)
        config.packed_modules_mapping = {name: list(parts) for name, parts in PARTS.items()}
        ours = SkipList(entries, "wildcard", headers="never")
        for layer in LAYERS:
            parent, _, leaf = layer.rpartition(".")
            try:
                expected: bool | None = config.is_layer_excluded(layer)
            except ValueError:  # a part of a fused layer
                expected = None
            assert ours.skips(layer, [f"{parent}.{one}" for one in PARTS.get(leaf, ())]) is expected, (layer, entries)
            seen[expected] += 1
    assert min(seen[value] for value in (True, False, None)) > 50


def test_settings_are_read_as_vllm_reads_them() -> None:
    classes = (ModelOptFp8Config, ModelOptNvFp4Config, ModelOptMxFp8Config, ModelOptMixedPrecisionConfig)
    by_name = dict(zip(("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed"), classes, strict=True))
    chance, seen = random.Random(9), Counter[str]()
    algorithms = [*ARGUMENTS, "fp8", "nvfp4", "W4A8_AWQ", "NVFP4_AWQ", "", None]
    for _ in range(2000):
        algorithm = chance.choice(algorithms)
        values: dict[str, Any] = {"quant_algo": algorithm, "exclude_modules": ["lm_head"], "ignore": ["lm_head"]}
        values |= {
            "group_size": chance.choice([16, 16, "16", 32, None]),
            "kv_cache_quant_algo": chance.choice(["FP8", None]),
        }
        values["quantized_layers"] = chance.choice([{}, {"model.layers.0.mlp.up_proj": {"quant_algo": "NVFP4"}}])
        if chance.random() < 0.3:
            values |= dict([chance.choice([("exclude_modules", "lm_head"), ("ignore", None), ("group_size", "x")])])
        for key in [key for key in values if chance.random() < 0.06]:
            del values[key]
        config = {"quantization": values} if chance.random() < 0.5 else values
        theirs: Any = None
        kind = by_name.get(ARGUMENTS.get(str(values.get("quant_algo")).upper(), ""), ModelOptFp8Config)
        with suppress(ValueError):
            theirs = kind.from_config({**config, "quant_method": "modelopt"})
        try:
            ours: Any = read(config)
        except ValueError:
            ours = None
        assert (ours is None) == (theirs is None), config
        seen["refused" if ours is None else ours.algorithm] += 1
        if ours is not None and ours.algorithm != MIXED:
            assert ours.algorithm == theirs.quant_method
            assert list(ours.excluded) == theirs.exclude_modules
            assert ours.group_size == getattr(theirs, "group_size", ours.group_size)
    assert seen.keys() >= {*ARGUMENTS, "refused"}


# --- an engine ----------------------------------------------------------------------------------------------------


def plain(name: str | Path, destination: Path) -> Path:
    """The folder dequantized to float32."""
    tensors = file(name)
    weights = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]
    return write_plain(DATA / name, destination, {f"{one}.weight": dequantized(tensors, one) for one in weights})


@pytest.mark.slow
def test_an_engine_gives_the_tokens_of_transformers(tmp_path: Path) -> None:
    """Linears and experts in NVFP4, two of four for each token. The config declares an FP8 cache, the plan 16 bits.

    At one token the router's second and third expert differ by 0.004, less than bfloat16 resolves.
    """
    folder = tmp_path / "model"
    shutil.copytree(DATA / "qwen3-moe", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 2}))
    options = {"dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "enforce_eager": True}
    generations = generate(folder, "modelopt", **options)
    compare(plain(folder, tmp_path / "plain"), generations, clear=0.2, close=0.3)
