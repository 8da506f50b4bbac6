"""Weights on vLLM's layers against compressed-tensors' own, and an engine against transformers in float32."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file
from torch import Tensor
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.quantization import get_quantization_config

import quantserve_compressed_tensors
from helpers.engines import compare, generate
from helpers.plain import write_plain
from helpers.vllm_layers import FUSED, become, engine, load
from quantserve_compressed_tensors.config import ENGINE, read_config

pytestmark = pytest.mark.vllm

DATA = Path(__file__).parent / "data"
REFERENCE = json.loads((DATA / "reference.json").read_text())
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
K = 128
Tensors = dict[str, Tensor]


_engine = engine(quantserve_compressed_tensors.register, VLLM_PLUGINS="compressed-tensors")


def config_of(values: dict[str, Any]) -> Any:
    made = get_quantization_config(ENGINE).from_config(values)
    made.packed_modules_mapping = FUSED
    return made


def written(name: str | Path) -> tuple[dict[str, Any], dict[str, Tensors]]:
    """The quantization config of a checkpoint, and its tensors by module, without those that the engine leaves out."""
    values = json.loads((DATA / name / "config.json").read_text())["quantization_config"]
    modules: dict[str, Tensors] = {}
    for path, tensor in load_file(DATA / name / "model.safetensors").items():
        module, _, suffix = path.rpartition(".")
        modules.setdefault(module, {}).update({} if suffix == "weight_shape" else {suffix: tensor})
    return values, modules


def whole(values: dict[str, Any], module: str, tensors: Tensors, n: int, k: int) -> Tensor:
    """W [n, k] of a module on one rank, as the kernel multiplies with it."""
    return weight(
        load(linear.ReplicatedLinear(k, n, False, quant_config=config_of(values), prefix=module), {None: tensors})
    )


def weight(layer: Any) -> Tensor:
    """W [n, k]: x is the identity."""
    out: Tensor = layer.quant_method.apply(layer, torch.eye(layer.kernel.k))
    return out.t()


def size_of(name: str | Path, module: str) -> tuple[int, int]:
    """Out_features and in_features in the models of make.py."""
    leaf, width = module.rpartition(".")[2], 64 if ".experts." in module else 256
    return {
        "k_proj": (64, K),
        "v_proj": (64, K),
        "gate_proj": (width, K),
        "up_proj": (width, K),
        "down_proj": (K, width),
    }.get(leaf, (K, K))


@pytest.mark.parametrize("name", list(REFERENCE))
def test_every_weight_is_bit_for_bit_that_of_compressed_tensors(name: str) -> None:
    values, modules = written(name)
    assert len(REFERENCE[name]) == sum("weight_scale" in tensors for tensors in modules.values()) >= 14
    for module, digest in REFERENCE[name].items():
        ours = whole(values, module, modules[module], *size_of(name, module)).to(torch.bfloat16) + 0
        assert hashlib.sha256(ours.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() == digest, module


@pytest.mark.parametrize("name", list(REFERENCE))
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_ranks_gets_its_share(name: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values, modules = written(name)
    every = {f"{ATTENTION}.{one}_proj" for one in "qkvo"} | {f"{MLP}.{one}_proj" for one in ("gate", "up", "down")}
    full = {module: whole(values, module, modules[module], *size_of(name, module)) for module in every}
    become(monkeypatch, rank, 2)
    config = config_of(values)
    layers = {
        "qkv": linear.QKVParallelLinear(K, 32, 4, 2, False, quant_config=config, prefix=f"{ATTENTION}.qkv_proj"),
        "gate_up": linear.MergedColumnParallelLinear(
            K, [256, 256], False, quant_config=config, prefix=f"{MLP}.gate_up_proj"
        ),
    }
    parts = {
        "qkv": [(one, f"{ATTENTION}.{one}_proj") for one in "qkv"],
        "gate_up": [(0, f"{MLP}.gate_proj"), (1, f"{MLP}.up_proj")],
    }
    for key, layer in layers.items():
        ours = weight(load(layer, {shard: modules[module] for shard, module in parts[key]}))
        assert torch.equal(ours, torch.cat([full[module].chunk(2)[rank] for _, module in parts[key]])), key
    for module, k in ((f"{ATTENTION}.o_proj", K), (f"{MLP}.down_proj", 256)):
        if name == "fp8-block" and k == K:  # whose block of 128 inputs two ranks would divide
            with pytest.raises(ValueError, match="in multiples of 128"):
                linear.RowParallelLinear(k, K, False, quant_config=config, prefix=module)
            continue
        row = linear.RowParallelLinear(k, K, False, quant_config=config, prefix=module)
        assert torch.equal(weight(load(row, {None: modules[module]})), full[module].chunk(2, dim=1)[rank]), module


def packed(
    n: int, g_idx: Tensor | None, bits: int = 4, group: int = 32, **changes: Any
) -> tuple[dict[str, Any], Tensors, Tensor]:
    """A config, random tensors [n, 128] that the installed compressed-tensors packs, and what it unpacks."""
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group, "symmetric": False, **changes}
    weights["actorder"] = None if g_idx is None else "group"
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    half, shape = 2 ** (bits - 1), (n, K // group)
    chance = torch.Generator().manual_seed(bits + n)
    zeros = torch.randint(-half, half, shape, generator=chance).to(torch.int8)
    stored = {
        "weight": torch.randn(n, K, generator=chance).bfloat16(),
        "weight_scale": ((torch.rand(shape, generator=chance) + 0.5) * 2 / half).bfloat16(),
        "weight_zero_point": zeros,
    } | ({} if g_idx is None else {"weight_g_idx": g_idx})  # fmt: skip
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = compressor.compress(stored, scheme)
    expected = compressor.decompress(tensors, scheme)["weight"]
    values = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    tensors.pop("weight_shape")
    return {**values, "config_groups": {"g": {"targets": ["Linear"], "weights": weights}}}, tensors, expected


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_act_order_and_words_of_older_versions(bits: int) -> None:
    """Scattered groups, and words that leave bits unused, as the installed version 0.17 writes them."""
    g_idx = torch.randperm(K, generator=torch.Generator().manual_seed(1)).to(torch.int32) // 32
    values, tensors, expected = packed(64, g_idx, bits)
    assert not torch.equal(g_idx, torch.arange(K, dtype=torch.int32) // 32)
    layer = linear.ReplicatedLinear(K, 64, False, quant_config=config_of(values), prefix=f"{MLP}.down_proj")
    assert torch.equal(weight(load(layer, {None: tensors})).bfloat16(), expected)


def test_act_order_cannot_be_divided_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    values, tensors, _ = packed(
        64, torch.arange(K, dtype=torch.int32).flip(0) // 32 * 0 + torch.arange(K, dtype=torch.int32) % 4
    )
    become(monkeypatch, 0, 2)
    layer = linear.RowParallelLinear(K, 64, False, quant_config=config_of(values), prefix=f"{MLP}.down_proj")
    with pytest.raises(ValueError, match=r"down_proj: g_idx gives .* tensor_parallel_size 1"):
        load(layer, {None: tensors})


@pytest.mark.parametrize(
    ("name", "suffix"), [("fp8", "weight_scale"), ("nvfp4", "weight_global_scale"), ("mixed", "weight_zero_point")]
)
def test_a_tensor_that_never_arrives(name: str, suffix: str) -> None:
    values, modules = written(name)
    module = f"{ATTENTION}.o_proj"
    layer = linear.RowParallelLinear(K, K, False, quant_config=config_of(values), prefix=module)
    with pytest.raises(ValueError, match=rf"lacks {module}\.{suffix}"):
        load(layer, {None: modules[module]}, without=suffix)


def test_exponents_that_are_nan() -> None:
    values, modules = written("mxfp4")
    tensors = {**modules[f"{ATTENTION}.o_proj"]}
    tensors["weight_scale"] = tensors["weight_scale"].index_fill(0, torch.tensor([3]), 255)
    layer = linear.RowParallelLinear(K, K, False, quant_config=config_of(values), prefix=f"{ATTENTION}.o_proj")
    with pytest.raises(ValueError, match=r"o_proj: scales holds 4 values that are not finite"):
        load(layer, {None: tensors})


def test_parts_of_a_fused_layer_in_different_groups() -> None:
    values, _ = written("mixture")
    values["config_groups"]["group_1"]["targets"] = [r"re:.*mlp\.gate_proj$", r"re:.*self_attn\.q_proj$"]
    values["config_groups"]["group_0"]["targets"] = [r"re:.*self_attn\.[kvo]_proj$"]
    with pytest.raises(ValueError, match=r"qkv_proj is one fused layer, but its modules are stored in different ways"):
        linear.QKVParallelLinear(K, 32, 4, 2, False, quant_config=config_of(values), prefix=f"{ATTENTION}.qkv_proj")


def test_a_fused_layer_that_the_model_does_not_tell() -> None:
    """vLLM's Qwen3-MoE says what its dense layers fuse after they are made; the headers tell."""
    values, modules = written("mixture")
    config = get_quantization_config(ENGINE).from_config(values)
    config.maybe_update_config(str(DATA / "mixture"))
    layer = linear.MergedColumnParallelLinear(K, [256, 256], False, quant_config=config, prefix=f"{MLP}.gate_up_proj")
    parts = [f"{MLP}.{one}_proj" for one in ("gate", "up")]
    ours = weight(load(layer, dict(enumerate(modules[part] for part in parts))))
    assert torch.equal(ours, torch.cat([whole(values, part, modules[part], 256, K) for part in parts]))


def decompressed(stored: Tensors, entry: dict[str, Any], size: tuple[int, int]) -> Tensor:
    """W [n, k] of the tensors of a module in float32, by compressed-tensors."""
    stored, scale = {**stored, "weight_shape": torch.tensor(size)}, stored["weight_scale"]
    if entry["format"] == "nvfp4-pack-quantized":  # decompress() would round to bfloat16
        values = unpack_fp4_from_uint8(stored["weight_packed"], *size, dtype=torch.float32)
        return dequantize(values, scale.float(), global_scale=stored["weight_global_scale"])
    if scale.is_floating_point():
        stored["weight_scale"] = scale.float()
    scheme = QuantizationScheme(targets=[], weights=entry["weights"])
    weight: Tensor = BaseCompressor.get_value_from_registry(entry["format"]).decompress(stored, scheme)["weight"]
    return weight


def plain(name: str | Path, destination: Path) -> Path:
    """A checkpoint in float32, by compressed-tensors."""
    values, modules = written(name)
    tensors = {}
    for module, stored in modules.items():
        if "weight_scale" in stored:
            group = read_config(values).of(module)
            assert group is not None
            entry = values["config_groups"][group.name]
            stored = {"weight": decompressed(stored, entry, size_of(name, module))}
        tensors[f"{module}.weight"] = stored["weight"]
    return write_plain(DATA / name, destination, tensors)


@pytest.mark.slow
def test_an_engine_gives_the_tokens_of_transformers(tmp_path: Path) -> None:
    """FP8, MXFP4 and integers in one model, and experts in NVFP4."""
    generations = generate(
        DATA / "mixture",
        "compressed-tensors",
        tmp_path / "out.json",
        quantization=ENGINE,
        dtype="float32",
        enforce_eager=True,
    )
    compare(plain("mixture", tmp_path / "plain"), generations, clear=0.02, close=0.02)
