"""GPTQ's tensors in the kernels and in vLLM's layers, against a decoder of this file and against AutoRound's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file
from torch import Tensor

from quantserve_gptq._packing import pack_linear
from quantserve_kernels import input_order

DATA = Path(__file__).parent / "data"
FILES = ("autoround-w4g32-sym", "autoround-w3g32-asym")
PARTS = ("qweight", "qzeros", "scales", "g_idx")
K, N, GROUP = 256, 64, 32
PREFIX = "model.layers.0.self_attn"


# --- the format, written down independently: one bit stream for each column or row ------------------


def stream(words: Tensor, bits: int) -> Tensor:
    """Codes int64 [rows, c * 32 / bits] of int32 words [rows, c], bit by bit."""
    every = torch.stack([(words.long() >> bit) & 1 for bit in range(32)], -1).reshape(len(words), -1, bits)
    return (every << torch.arange(bits)).sum(-1)


def words_of(codes: Tensor, bits: int) -> Tensor:
    """int32 words [rows, c * bits / 32] of codes [rows, c]."""
    every = ((codes.long()[..., None] >> torch.arange(bits)) & 1).reshape(len(codes), -1, 32)
    words = (every << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def decode(parts: dict[str, Tensor], bits: int, offset: int = 1) -> Tensor:
    """The weight [n, k] in float64 that the stored tensors mean, by ``g_idx``."""
    zeros = (stream(parts["qzeros"], bits) + offset) % 2**bits
    group = parts["g_idx"].long()
    return (stream(parts["qweight"].t(), bits).t() - zeros[group]).t() * parts["scales"].double()[group].t()


def linear_parts(
    bits: int, *, sym: bool = False, offset: int = 1, act_order: bool = False, seed: int = 0, n: int = N
) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (K, n), generator=made)
    zeros = torch.randint(1, 2**bits, (K // GROUP, n), generator=made)
    if sym:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    order = torch.randperm(K, generator=torch.Generator().manual_seed(99)) if act_order else torch.arange(K)
    return {
        "qweight": words_of(codes.t(), bits).t().contiguous(),
        "qzeros": words_of((zeros - offset) % 2**bits, bits),
        "scales": (torch.rand(K // GROUP, n, generator=made) * 0.01 + 0.001).half(),
        "g_idx": (order // GROUP).to(torch.int32),
    }


# --- packing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_weights_of_autorounds_files_are_autorounds(name: str) -> None:
    quantization = json.loads((DATA / name / "config.json").read_text())["quantization_config"]
    tensors, digests = load_file(DATA / name / "model.safetensors"), json.loads((DATA / "reference.json").read_text())
    for weight, digest in digests[name].items():
        parts = {part: tensors[weight.replace("weight", part)] for part in PARTS}
        packed, order = pack_linear(**parts, bits=quantization["bits"], sym=quantization["sym"], zero_offset=1)
        assert order is None
        assert torch.equal(packed.dequantize(torch.float64).float(), decode(parts, quantization["bits"]).float())
        octets = (packed.dequantize().bfloat16() + 0).view(torch.uint8).numpy().tobytes()
        assert hashlib.sha256(octets).hexdigest() == digest, weight
    assert len(digests[name]) == 14


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_version_and_order(bits: int, offset: int, act_order: bool) -> None:
    parts = linear_parts(bits, offset=offset, act_order=act_order)
    packed, order = pack_linear(**parts, bits=bits, sym=False, zero_offset=offset)
    expected = decode(parts, bits, offset)
    assert (order is not None) == act_order
    assert torch.equal(packed.dequantize(torch.float64), expected if order is None else expected[:, order])


def test_zeros_of_symmetric_files_do_not_count() -> None:
    parts = linear_parts(4, sym=True)
    expected = decode(parts, 4)
    packed, _ = pack_linear(**{**parts, "qzeros": parts["qzeros"] * 0 - 1}, bits=4, sym=True, zero_offset=1)
    assert torch.equal(packed.dequantize(torch.float64), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_zero_of_0_borrows_from_its_neighbour_in_version_1(bits: int) -> None:
    """GPTQModel turns version 2 into version 1 by subtracting from whole words."""
    parts = linear_parts(bits, offset=0)
    zeros = stream(parts["qzeros"], bits)
    zeros[:, ::3] = 0
    parts["qzeros"] = words_of(zeros, bits)
    expected = decode(parts, bits, 0)
    one_each = words_of(torch.ones_like(zeros), bits)
    packed, _ = pack_linear(**{**parts, "qzeros": parts["qzeros"] - one_each}, bits=bits, sym=False, zero_offset=1)
    assert torch.equal(packed.dequantize(torch.float64), expected)


def test_groups_that_no_kernel_can_have() -> None:
    scattered = torch.randint(0, 8, (K,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    with pytest.raises(ValueError, match=r"expected 8 groups of 32.*tensor_parallel_size 1"):
        input_order(scattered, GROUP)
    assert input_order(torch.arange(K // 2, K) // GROUP, GROUP) is None  # the second of two ranks


# --- vLLM's layers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("vllm")
    from helpers import vllm_layers
    from quantserve_gptq import register

    register()
    with vllm_layers.surroundings(tmp_path_factory.mktemp("group")):
        yield vllm_layers


def config_of(bits: int = 4, **changes: Any) -> Any:
    from vllm.model_executor.layers.quantization import get_quantization_config

    values = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": False, "desc_act": False, **changes}
    made = get_quantization_config("gptq_codebook").from_config(values)
    made.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return made


def qkv(vllm: Any, config: Any, parts: dict[str, dict[str, Tensor]]) -> Any:
    from vllm.model_executor.layers.linear import QKVParallelLinear

    layer = QKVParallelLinear(K, 16, 4, 2, bias=False, quant_config=config, prefix=f"{PREFIX}.qkv_proj")
    return vllm.load(layer, parts)


@pytest.mark.vllm
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_fused_layer_with_act_order(vllm: Any, bits: int) -> None:
    parts = {
        one: linear_parts(bits, act_order=True, seed=seed, n=64 if one == "q" else 32) for seed, one in enumerate("qkv")
    }
    layer = qkv(vllm, config_of(bits, desc_act=True), parts)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(7))
    expected = x.double() @ torch.cat([decode(one, bits) for one in parts.values()]).t()
    assert torch.allclose(layer.quant_method.apply(layer, x).double(), expected, atol=1e-3)


@pytest.mark.vllm
def test_orders_that_differ_within_a_fused_layer(vllm: Any) -> None:
    parts = {one: linear_parts(4, act_order=True, n=64 if one == "q" else 32) for one in "qkv"}
    parts["k"]["g_idx"] = parts["k"]["g_idx"].flip(0)
    with pytest.raises(ValueError, match=r"qkv_proj: the modules of this fused layer have inputs in different orders"):
        qkv(vllm, config_of(desc_act=True), parts)


@pytest.mark.vllm
def test_rules_name_modules_and_not_the_fused_layer(vllm: Any) -> None:
    rules = {r"+:.*\.[qkv]_proj": {"bits": 8, "sym": True}, "-:.*o_proj": {}}
    config = config_of(dynamic=rules)
    parts = {one: linear_parts(8, sym=True, seed=seed, n=64 if one == "q" else 32) for seed, one in enumerate("qkv")}
    layer = qkv(vllm, config, parts)
    x = torch.randn(2, K, generator=torch.Generator().manual_seed(3))
    expected = x.double() @ torch.cat([decode(one, 8) for one in parts.values()]).t()
    assert torch.allclose(layer.quant_method.apply(layer, x).double(), expected, rtol=1e-4, atol=1e-3)
    assert config.scheme(f"{PREFIX}.o_proj") is None
    with pytest.raises(ValueError, match="are quantized differently"):
        qkv(vllm, config_of(dynamic={"+:.*q_proj": {"sym": True}}), {})


@pytest.mark.vllm
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_two_has_its_inputs_groups(vllm: Any, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    vllm.become(monkeypatch, rank, 2)
    parts = linear_parts(3)
    layer = RowParallelLinear(K, N, bias=False, quant_config=config_of(3), prefix=f"{PREFIX}.o_proj")
    vllm.load(layer, {None: parts})
    x = torch.randn(2, K // 2, generator=torch.Generator().manual_seed(3))
    half = decode(parts, 3)[:, rank * K // 2 : (rank + 1) * K // 2]
    assert torch.allclose(layer.quant_method.apply(layer, x).double(), x.double() @ half.t(), atol=1e-3)
    scattered = RowParallelLinear(K, N, bias=False, quant_config=config_of(3), prefix=f"{PREFIX}.o_proj")
    with pytest.raises(ValueError, match="tensor_parallel_size 1"):
        vllm.load(scattered, {None: linear_parts(3, act_order=True)})


@pytest.mark.vllm
def test_files_go_to_vllms_own_gptq_unless_the_argument_names_ours(vllm: Any) -> None:
    ours = type(config_of())
    assert ours.override_quantization_method({"quant_method": "gptq"}, "gptq_codebook") == "gptq_codebook"
    assert ours.override_quantization_method({"quant_method": "gptq"}, None) is None
    assert ours.override_quantization_method({"quant_method": "awq"}, "gptq_codebook") is None
