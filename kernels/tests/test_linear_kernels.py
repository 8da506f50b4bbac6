"""vLLM's own AWQ, GPTQ, AutoRound and compressed-tensors layers on our kernel, against float64.

Weights are random integers, packed by functions of this file and of compressed-tensors. They mean
`(code - zero) * scale`, as the formats define it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor
from vllm.lora.layers import RowParallelLinearWithLoRA
from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS, MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

from helpers.vllm_layers import FUSED, load, surroundings
from quantserve_kernels import Status, instruction_set
from quantserve_kernels._ops import instruction_sets
from quantserve_kernels.vllm import linear_kernels
from quantserve_kernels.vllm.asked import asked_for
from quantserve_kernels.vllm.linear_kernels import CodebookLinearKernel, keep_scales, register, serves

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is registered on CPUs only"),
]

K = 256
PREFIX = "model.layers.3.mlp.down_proj"
THEIRS = "CPUWNA16LinearKernel,ZentorchWNA16LinearKernel"
"""vLLM's own kernels for CPUs that compute AWQ layers."""
Parts = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def _engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's own kernels are left out."""
    register()
    keep_scales()
    with surroundings(tmp_path_factory.mktemp("group"), VLLM_DISABLED_KERNELS=THEIRS):
        yield


# --- the formats, written down independently -------------------------------------------------------


def packed(codes: Tensor, dim: int, order: tuple[int, ...] = tuple(range(8)), bits: int = 4) -> Tensor:
    """int32 words of `32 / bits` codes each along `dim`; field i of a word is its code `order[i]`."""
    per = 32 // bits
    fields = codes.movedim(dim, -1).to(torch.int64).reshape(*codes.movedim(dim, -1).shape[:-1], -1, per)
    words = sum(fields[..., code] << (bits * field) for field, code in enumerate(order[:per]))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).movedim(-1, dim).contiguous()


def numbers(n: int, group: int, *, bits: int, seed: int, k: int = K) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [n, k], zeros [n, k / group] and scales [n, k / group] in float16."""
    made = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else k // group
    codes = torch.randint(0, 2**bits, (n, k), generator=made)
    zeros = torch.randint(1, 2**bits, (n, groups), generator=made)
    return codes, zeros, (torch.rand(n, groups, generator=made) * 0.01 + 0.001).half()


def meant(codes: Tensor, zeros: Tensor | int, scales: Tensor) -> Tensor:
    """The weight [n, k] in float64."""
    each = codes.shape[1] // scales.shape[1]
    wide = zeros.repeat_interleave(each, 1) if isinstance(zeros, Tensor) else zeros
    return (codes - wide).double() * scales.double().repeat_interleave(each, 1)


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq(n: int, group: int, seed: int, k: int = K, **_: Any) -> tuple[Parts, Tensor]:
    codes, zeros, scales = numbers(n, group, bits=4, seed=seed, k=k)
    parts = {"qweight": packed(codes.t(), 1, AWQ_ORDER), "qzeros": packed(zeros.t(), 1, AWQ_ORDER)}
    return {**parts, "scales": scales.t().contiguous()}, meant(codes, zeros, scales)


def gptq(n: int, group: int, seed: int, k: int = K, version: int = 1) -> tuple[Parts, Tensor]:
    """Symmetric: the zero point is 8, stored as 7 in version 1 of the format; g_idx is not read by vLLM."""
    codes, zeros, scales = numbers(n, group, bits=4, seed=seed, k=k)
    stored = packed(torch.full_like(zeros, 8 if version == 2 else 7).t(), 1)
    parts = {"qweight": packed(codes.t(), 0), "qzeros": stored, "scales": scales.t().contiguous()}
    return parts, meant(codes, 8, scales)


def compressed(
    n: int, group: int, seed: int, k: int = K, bits: int = 4, symmetric: bool = True
) -> tuple[Parts, Tensor]:
    """Signed values in the file, shifted by half of the range in the words."""
    codes, zeros, scales = numbers(n, group, bits=bits, seed=seed, k=k)
    half = 2 ** (bits - 1)
    parts = {
        "weight_packed": pack_to_int32((codes - half).to(torch.int8), bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([n, k]),
    }
    if symmetric:
        return parts, meant(codes, half, scales)
    parts["weight_zero_point"] = pack_to_int32((zeros - half).to(torch.int8), bits, packed_dim=0).contiguous()
    return parts, meant(codes, zeros, scales)


def config_of(method: str, group: int, **changes: Any) -> Any:
    symmetric = changes.pop("symmetric", True)
    bits = changes.pop("bits", 4)
    values: dict[str, Any] = {
        "awq": {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True},
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": True},
        "inc": {"quant_method": "auto-round", "bits": 4, "group_size": group, "sym": True,
                "packing_format": "auto_round:auto_gptq"},
        "compressed-tensors": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
                "num_bits": bits, "type": "int", "symmetric": symmetric,
                "strategy": "channel" if group == -1 else "group", "group_size": None if group == -1 else group}}},
            "ignore": [],
        },
    }[method]  # fmt: skip
    config = get_quantization_config({"gptq": "auto_gptq"}.get(method, method)).from_config({**values, **changes})
    config.packed_modules_mapping = FUSED
    return config


def row_parallel(config: Any, n: int = 64, k: int = K, **options: Any) -> Any:
    return linear.RowParallelLinear(k, n, **{"bias": False, **options}, quant_config=config, prefix=PREFIX)


def close(layer: Any, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether the layer multiplies as float64 does, in float32."""
    x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
    expected = x.double() @ weight.t() + (0 if bias is None else bias.double())
    assert layer.kernel.n == weight.shape[0]
    made = layer.quant_method.apply(layer, x, bias)
    assert made.dtype == x.dtype
    return torch.allclose(made.double(), expected, rtol=1e-5, atol=1e-5)


FORMATS = [
    ("awq", awq, {}),
    ("gptq", gptq, {}),
    ("gptq", gptq, {"version": 2}),
    ("inc", gptq, {}),
    ("compressed-tensors", compressed, {}),
    ("compressed-tensors", compressed, {"symmetric": False}),
    ("compressed-tensors", compressed, {"bits": 8}),
    ("compressed-tensors", compressed, {"bits": 8, "symmetric": False}),
    ("compressed-tensors", compressed, {"bits": 2}),
]


@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize(("method", "make", "options"), FORMATS)
class TestFormats:
    def test_qkv(self, method: str, make: Any, options: dict[str, Any], group: int) -> None:
        config = config_of(method, group, **_of(options))
        layer = linear.QKVParallelLinear(K, 16, 8, 2, bias=False, quant_config=config, prefix="l.attn.qkv_proj")
        shards = {
            shard: make(n, group, seed, **options)
            for seed, (shard, n) in enumerate({"q": 128, "k": 32, "v": 32}.items())
        }
        load(layer, {shard: parts for shard, (parts, _) in shards.items()})
        assert close(layer, torch.cat([weight for _, weight in shards.values()]))

    def test_gate_up(self, method: str, make: Any, options: dict[str, Any], group: int) -> None:
        config = config_of(method, group, **_of(options))
        layer = linear.MergedColumnParallelLinear(
            K, [96, 96], bias=False, quant_config=config, prefix="l.mlp.gate_up_proj"
        )
        shards = {shard: make(96, group, 4 + shard, **options) for shard in (0, 1)}
        load(layer, {shard: parts for shard, (parts, _) in shards.items()})
        assert close(layer, torch.cat([weight for _, weight in shards.values()]))

    def test_row_parallel_with_a_bias(self, method: str, make: Any, options: dict[str, Any], group: int) -> None:
        layer = row_parallel(config_of(method, group, **_of(options)), bias=True)
        parts, weight = make(64, group, 7, **options)
        bias = torch.randn(64)
        layer.bias.data.copy_(bias)
        load(layer, {None: parts})
        assert close(layer, weight, bias)


def _of(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "version"}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("method", "make", "options"), FORMATS)
@pytest.mark.parametrize("group", [64, -1])
def test_a_rank_of_two_gets_its_inputs(
    method: str, make: Any, options: dict[str, Any], group: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (method, group) == ("awq", -1):
        pytest.skip("vLLM's AWQ method has no scales for a part of the only group; `quantserve check` refuses it")
    for module in ("parameter", "layers.linear"):
        monkeypatch.setattr(f"vllm.model_executor.{module}.get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(f"vllm.model_executor.{module}.get_tensor_model_parallel_world_size", lambda: 2)
    layer = row_parallel(config_of(method, group, **_of(options)))
    parts, weight = make(64, group, 8, **options)
    load(layer, {None: parts})
    assert close(layer, weight[:, rank * K // 2 : (rank + 1) * K // 2])


def test_shapes_vllms_kernel_does_not_take() -> None:
    layer = row_parallel(config_of("awq", 16), n=24, k=48)
    parts, weight = awq(24, 16, 4, k=48)
    load(layer, {None: parts})
    assert close(layer, weight)


@pytest.mark.parametrize("name", instruction_sets())
def test_on_every_instruction_set(name: str) -> None:
    """vLLM's own kernel needs AVX-512 (vLLM issue 55613)."""
    before = instruction_set()
    try:
        instruction_set(name)
        parts, weight = awq(64, 128, 3)
        assert close(load(row_parallel(config_of("awq", 128)), {None: parts}), weight)
    finally:
        instruction_set(before)


def test_files_with_zero_point_false_have_their_stored_zeros_subtracted() -> None:
    """auto-round stores 8 in all of them."""
    codes, zeros, scales = numbers(64, 128, bits=4, seed=7)
    parts = {
        "qweight": packed(codes.t(), 1, AWQ_ORDER),
        "qzeros": packed(torch.full_like(zeros, 8).t(), 1, AWQ_ORDER),
        "scales": scales.t().contiguous(),
    }
    layer = load(row_parallel(config_of("awq", 128, zero_point=False)), {None: parts})
    assert close(layer, meant(codes, 8, scales))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_rest_packed_and_scales_keep_their_bits(dtype: torch.dtype) -> None:
    parts, weight = awq(64, 128, 5)
    torch.set_default_dtype(dtype)  # as vLLM does while it loads
    try:
        layer = load(row_parallel(config_of("awq", 128), params_dtype=dtype), {None: parts})
    finally:
        torch.set_default_dtype(torch.float32)
    assert not list(layer.parameters())
    assert sum(tensor.nbytes for tensor in layer.buffers()) == 64 * K // 2 + 2 * (64 * 2 * 2) + 4 * 16
    assert close(layer, weight)  # scales rounded to bfloat16 would not be
    assert layer.quant_method.apply(layer, torch.randn(2, K).to(dtype)).dtype == dtype


def test_without_the_patch_scales_have_the_models_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with vLLM's own kernel. The rest is the same."""
    monkeypatch.setattr(linear_kernels, "_last", None)
    monkeypatch.setattr("torch.nn.modules.module._global_parameter_registration_hooks", {})
    layer = row_parallel(config_of("awq", 128), params_dtype=torch.bfloat16)
    codes, zeros, scales = numbers(64, 128, bits=4, seed=5)
    load(layer, {None: awq(64, 128, 5)[0]})
    assert close(layer, meant(codes, zeros, scales.bfloat16()))


@pytest.mark.parametrize(("method", "make", "name"), [
    ("awq", awq, "qweight"), ("gptq", gptq, "qweight"), ("compressed-tensors", compressed, "weight_packed"),
])  # fmt: skip
def test_lora_wraps_the_packed_layer(method: str, make: Any, name: str) -> None:
    """vLLM's wrapper asks the packed weight for its device, and multiplies with the layer's own method."""
    layer = load(row_parallel(config_of(method, 128)), {None: make(64, 128, 8)[0]})
    assert getattr(layer, name) is layer.kernel.codes  # no second copy
    wrapped = RowParallelLinearWithLoRA(layer)
    assert wrapped.device.type == wrapped.weight.device.type == "cpu"
    x = torch.randn(2, K)
    assert torch.equal(wrapped.base_layer.quant_method.apply(layer, x), layer.kernel(x))


# --- what must not load -------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "make", "name"), [
    ("awq", awq, "scales"), ("gptq", gptq, "scales"), ("compressed-tensors", compressed, "weight_scale"),
])  # fmt: skip
def test_scales_that_never_arrive_are_named(method: str, make: Any, name: str) -> None:
    parts, _ = make(64, 128, 6)
    with pytest.raises(ValueError, match=rf"layers\.3\.mlp\.down_proj: 128 of 128 values of {name} never arrived"):
        load(row_parallel(config_of(method, 128)), {None: parts}, without=name)


def test_one_module_of_a_fused_layer_that_never_arrives() -> None:
    layer = linear.MergedColumnParallelLinear(
        K, [96, 32], bias=False, quant_config=config_of("awq", 128), prefix="l.mlp.gate_up_proj"
    )
    with pytest.raises(ValueError, match=r"l\.mlp\.gate_up_proj: 64 of 256 values of scales never arrived"):
        load(layer, {0: awq(96, 128, 1)[0]})


def test_a_bias_that_was_rounded_to_infinity_is_refused() -> None:
    layer = row_parallel(config_of("awq", 128), bias=True, params_dtype=torch.float16)
    layer.bias.data.copy_(torch.full((64,), 1e5))
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.down_proj: bias holds 64 values .* not finite in float16"):
        load(layer, {None: awq(64, 128, 9)[0]})


# --- which kernel a layer gets ------------------------------------------------------------------

LAYER = MPLinearLayerConfig(
    full_weight_shape=(512, 64),
    partition_weight_shape=(256, 64),
    weight_type=scalar_types.uint4,
    act_type=torch.bfloat16,
    group_size=128,
    zero_points=True,
)


def test_vllm_asks_its_own_kernels_first(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    kernels = [one.__name__ for one in _POSSIBLE_KERNELS[PlatformEnum.CPU]]
    assert kernels.count("CodebookLinearKernel") == 1
    assert choose_mp_linear_kernel(LAYER) is CodebookLinearKernel
    monkeypatch.delenv("VLLM_DISABLED_KERNELS")
    assert choose_mp_linear_kernel(LAYER).__name__ == "CPUWNA16LinearKernel"
    odd = replace(LAYER, partition_weight_shape=(256, 24))
    assert choose_mp_linear_kernel(odd) is CodebookLinearKernel


def test_the_variable_names_every_kernel_of_vllm_that_computes_awq() -> None:
    """`Dynamic4bitLinearKernel` has signed weights in scheme W4A8, which AWQ has not."""
    others = {one.__name__ for one in _POSSIBLE_KERNELS[PlatformEnum.CPU] if one is not CodebookLinearKernel}
    assert others == {*THEIRS.split(","), "Dynamic4bitLinearKernel"}


@pytest.mark.parametrize(("method", "make"), [("awq", awq), ("gptq", gptq), ("compressed-tensors", compressed)])
def test_a_layer_says_who_computes_it(method: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert serves(row_parallel(config_of(method, 128)))
    assert not serves(row_parallel(None))
    monkeypatch.delenv("VLLM_DISABLED_KERNELS")
    assert not serves(row_parallel(config_of(method, 128)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weight_type": scalar_types.uint3b4}, "uint3b4"),
        ({"weight_type": scalar_types.int4}, "int4"),
        ({"act_type": torch.int8}, r"activations are torch\.int8"),
        ({"out_type": torch.float32}, r"bfloat16 and results torch\.float32"),
        ({"partition_weight_shape": (260, 64), "group_size": 65}, "K 260 is no whole number of int32 words"),
        ({"group_size": 96}, "groups of 96 do not divide K 256"),
    ],
)
def test_what_it_cannot_compute_has_a_reason(changes: dict[str, Any], words: str) -> None:
    served, reason = CodebookLinearKernel.can_implement(replace(LAYER, **changes))
    assert not served
    assert reason is not None
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(reason)


def test_act_order_of_vllm_0_29_is_refused() -> None:
    """Later versions have no such field, and refuse it before they ask for a kernel."""
    layer = replace(LAYER)
    layer.has_g_idx = True
    assert CodebookLinearKernel.can_implement(layer) == (False, "the checkpoint has act-order (desc_act)")
    layer.has_g_idx = False
    assert CodebookLinearKernel(layer, "qweight", "scales", "qzeros", w_gidx_param_name="g_idx").config is layer


def test_a_model_is_refused_where_the_kernel_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_kernels, "status", lambda: Status(False, "torch", "no compiler"))
    with pytest.raises(ValueError, match=r"CodebookLinearKernel .* is not compiled here \(no compiler\)"):
        choose_mp_linear_kernel(LAYER)
    monkeypatch.delenv("VLLM_DISABLED_KERNELS")
    assert choose_mp_linear_kernel(LAYER).__name__ == "CPUWNA16LinearKernel"


def test_the_layers_of_a_model_are_counted_once() -> None:
    linear_kernels._new.clear()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    linear_kernels.logger.addHandler(handler)  # its own, because tests before may have changed those of vLLM
    before = linear_kernels.logger.level
    linear_kernels.logger.setLevel(logging.INFO)
    try:
        layers = [row_parallel(config_of("awq", 128)) for _ in range(3)]
        for seed, layer in enumerate(layers):
            load(layer, {None: awq(64, 128, seed)[0]})
    finally:
        linear_kernels.logger.removeHandler(handler)
        linear_kernels.logger.setLevel(before)
    (counted,) = [line for line in said if line.startswith("Quantized linear layers")]
    assert "3 on CodebookLinearKernel" in counted


@pytest.mark.parametrize(
    ("variables", "registers"),
    [
        ({}, False),  # a plain `vllm serve` loads every plugin
        ({"VLLM_PLUGINS": ""}, False),
        ({"VLLM_PLUGINS": "other,awq"}, True),
        ({"VLLM_PLUGINS": "quantserve", "QUANTSERVE_ENGINE_PLUGINS": "quantserve-squeezellm:squeezellm"}, False),
        ({"VLLM_PLUGINS": "quantserve", "QUANTSERVE_ENGINE_PLUGINS": "a:b,quantserve-awq:awq"}, True),
    ],
)
def test_who_asks_for_the_kernel(variables: dict[str, str], registers: bool) -> None:
    assert asked_for("quantserve-awq:awq", variables) == registers
