"""vLLM's own parallel layers with our AWQ method, against the dequantized weight; and vLLM's method left as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
from vllm.lora.layers import RowParallelLinearWithLoRA
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig

import quantserve_awq
from quantserve_awq._format import dequantize_linear, quantize_linear

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="AWQ stays on vLLM's kernels where there is a GPU"),
]

K = 256


@pytest.fixture(scope="module", autouse=True)
def _engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The surroundings a vLLM layer needs: a config and a group of one process."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    quantserve_awq.register()
    with set_current_vllm_config(VllmConfig()):
        store = tmp_path_factory.mktemp("group") / "store"
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        initialize_model_parallel(1)
        yield
        cleanup_dist_env_and_memory()


def _config(group: int = 128, **changes: Any) -> Any:
    values = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, **changes}
    config = get_quantization_config("quantserve_awq").from_config(values)
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return config


def _parts(n: int, k: int, group: int, seed: int) -> dict[str, torch.Tensor]:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * k**-0.5
    return quantize_linear(weight, group)._asdict()


def _load(layer: Any, parts: dict[Any, dict[str, torch.Tensor]]) -> Any:
    for shard, tensors in parts.items():
        for name, tensor in tensors.items():
            parameter = getattr(layer, name)
            parameter.weight_loader(*([parameter, tensor] if shard is None else [parameter, tensor, shard]))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_fused_layers(group: int) -> None:
    shards = {"q": _parts(128, K, group, 1), "k": _parts(32, K, group, 2), "v": _parts(32, K, group, 3)}
    layer = linear.QKVParallelLinear(
        K, 16, 8, 2, bias=False, quant_config=_config(group), prefix="model.layers.0.self_attn.qkv_proj"
    )
    _load(layer, shards)
    x = torch.randn(3, K)
    expected = x @ torch.cat([dequantize_linear(**parts) for parts in shards.values()]).t()
    assert torch.allclose(layer.quant_method.apply(layer, x), expected, atol=1e-4)


def test_shapes_vllms_kernel_does_not_take_and_a_bias() -> None:
    parts = _parts(24, 48, 16, 4)
    layer = linear.RowParallelLinear(48, 24, bias=True, quant_config=_config(16), prefix="model.layers.0.mlp.down_proj")
    x, bias = torch.randn(5, 48), torch.randn(24)
    layer.bias.data.copy_(bias)
    _load(layer, {None: parts})
    expected = x @ dequantize_linear(**parts).t() + bias
    assert torch.allclose(layer.quant_method.apply(layer, x, bias), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_rest_packed_and_scales_keep_their_bits(dtype: torch.dtype) -> None:
    parts = _parts(64, K, 128, 5)
    torch.set_default_dtype(dtype)  # as vLLM does while it loads
    try:
        layer = linear.RowParallelLinear(
            K, 64, bias=False, quant_config=_config(), params_dtype=dtype, prefix="model.layers.0.mlp.down_proj"
        )
        _load(layer, {None: parts})
    finally:
        torch.set_default_dtype(torch.float32)
    assert not list(layer.parameters())
    assert sum(tensor.nbytes for tensor in layer.buffers()) == 64 * K // 2 + 2 * (64 * 2 * 2) + 4 * 16
    x = torch.randn(2, K)
    assert torch.allclose(layer.quant_method.apply(layer, x), x @ dequantize_linear(**parts).t(), atol=1e-4)
    assert layer.quant_method.apply(layer, x.to(dtype)).dtype == dtype


def test_lora_wraps_the_packed_layer() -> None:
    """vLLM's wrapper asks for `qweight`, and multiplies with the layer's own method."""
    layer = linear.RowParallelLinear(K, 64, bias=False, quant_config=_config(), prefix="model.layers.0.mlp.down_proj")
    _load(layer, {None: _parts(64, K, 128, 8)})
    assert layer.qweight is layer.kernel.codes  # no second copy
    wrapped = RowParallelLinearWithLoRA(layer)
    assert wrapped.device.type == wrapped.weight.device.type == "cpu"
    x = torch.randn(2, K)
    assert torch.equal(wrapped.base_layer.quant_method.apply(layer, x), layer.kernel(x))


def test_a_bias_that_was_rounded_to_infinity_is_refused() -> None:
    layer = linear.RowParallelLinear(
        K, 64, bias=True, quant_config=_config(), params_dtype=torch.float16, prefix="model.layers.3.mlp.down_proj"
    )
    layer.bias.data.copy_(torch.full((64,), 1e5))  # beyond float16
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.down_proj: bias holds 64 values .* not finite in float16"):
        _load(layer, {None: _parts(64, K, 128, 9)})


def test_a_missing_tensor_is_named() -> None:
    layer = linear.RowParallelLinear(K, 64, bias=False, quant_config=_config(), prefix="model.layers.3.mlp.down_proj")
    parts = _parts(64, K, 128, 6)
    del parts["scales"]
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp\.down_proj: scales holds 128 values that are not fin"):
        _load(layer, {None: parts})


def test_vllms_own_awq_is_left_as_it_was() -> None:
    quantserve_awq.register()
    assert QUANTIZATION_METHODS.count("quantserve_awq") == 1
    for name in ("awq", "auto_awq", "awq_marlin"):
        assert get_quantization_config(name) is AutoAWQConfig
    ours = get_quantization_config("quantserve_awq")
    awq, gptq = {"quant_method": "awq", "bits": 4}, {"quant_method": "gptq", "bits": 4}
    assert ours.override_quantization_method(awq, "quantserve_awq", hf_config=None) == "quantserve_awq"
    for asked in (None, "awq", "auto_awq"):
        assert ours.override_quantization_method(awq, asked, hf_config=None) is None
    assert ours.override_quantization_method(gptq, "quantserve_awq", hf_config=None) is None


def test_layers_it_does_not_quantize_stay_vllms() -> None:
    prefix = "model.layers.3.mlp.down_proj"
    skipped = linear.RowParallelLinear(
        K, 64, bias=False, quant_config=_config(modules_to_not_convert=["layers.3."]), prefix=prefix
    )
    assert isinstance(skipped.quant_method, linear.UnquantizedLinearMethod)


def test_files_with_zero_point_false_have_their_stored_zeros_subtracted() -> None:
    """auto-round stores 8 in all of them; vLLM's own kernels for CPUs subtract 8 without reading them."""
    parts = _parts(64, K, 128, 7)
    parts["qzeros"] = torch.full_like(parts["qzeros"], -0x77777778)  # eight nibbles of 8
    prefix = "model.layers.3.mlp.down_proj"
    layer = linear.RowParallelLinear(K, 64, bias=False, quant_config=_config(zero_point=False), prefix=prefix)
    _load(layer, {None: parts})
    assert type(layer.quant_method).__name__ == "KernelAWQLinearMethod"
    x = torch.randn(3, K)
    assert torch.allclose(layer.quant_method.apply(layer, x), x @ dequantize_linear(**parts).t(), atol=1e-4)
