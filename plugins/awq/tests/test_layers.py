"""vLLM's AWQ layers with our kernel: the plugin's exported tensors, and engines that did not ask for it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")

import torch
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.quantization import get_quantization_config

import quantserve_awq
from helpers.vllm_layers import engine, load
from quantserve.api import DISABLED_KERNELS, OUR_KERNEL, VLLM_KERNEL
from quantserve.predict.cpu_kernels import WITHOUT_THEIRS
from quantserve_awq._format import dequantize_linear, quantize_linear

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="AWQ stays on vLLM's kernels where there is a GPU"),
]

K = 256
PREFIX = "model.layers.3.mlp.down_proj"


_engine = engine()


def config_of(group: int = 128, **changes: Any) -> Any:
    values = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, **changes}
    return get_quantization_config("awq").from_config(values)


@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_what_the_plugin_exports(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "awq")
    for name, value in WITHOUT_THEIRS.items():
        monkeypatch.setenv(name, value)
    quantserve_awq.register()
    quantserve_awq.register()
    layer = linear.RowParallelLinear(K, 64, bias=False, quant_config=config_of(group), prefix=PREFIX)
    weight = torch.randn(64, K, generator=torch.Generator().manual_seed(1)) * K**-0.5
    parts = quantize_linear(weight, group)._asdict()
    load(layer, {None: parts})
    assert type(layer.quant_method.kernel).__name__ == OUR_KERNEL
    x = torch.randn(3, K)
    assert torch.allclose(layer.quant_method.apply(layer, x), x @ dequantize_linear(**parts).t(), atol=1e-4)


@pytest.mark.parametrize("variables", [{}, {"VLLM_PLUGINS": ""}, {"VLLM_PLUGINS": "other"}])
def test_other_engines_keep_vllms_kernel(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain `vllm serve` loads every installed plugin."""
    for name in ("VLLM_PLUGINS", "QUANTSERVE_ENGINE_PLUGINS", DISABLED_KERNELS):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("quantserve_kernels.vllm.linear_kernels.register", pytest.fail)
    quantserve_awq.register()
    layer = linear.RowParallelLinear(K, 64, bias=False, quant_config=config_of(), prefix=PREFIX)
    assert type(layer.quant_method.kernel).__name__ == VLLM_KERNEL


def test_layers_that_are_not_quantized_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "awq")
    quantserve_awq.register()
    skipped = linear.RowParallelLinear(
        K, 64, bias=False, quant_config=config_of(modules_to_not_convert=["layers.3."]), prefix=PREFIX
    )
    assert isinstance(skipped.quant_method, linear.UnquantizedLinearMethod)
