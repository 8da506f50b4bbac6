"""What `check` says of CPUs, against vLLM's own layers: built, loaded and multiplied on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantserve.api import Checkpoint
from quantserve.config import model_from_source
from quantserve.target import find_target
from quantserve_vllm.plugin import quantserve_validate

pytest.importorskip("vllm")
vllm_layers = pytest.importorskip("helpers.vllm_layers")
N = K = 256

QUARK = {"quant_method": "quark", "export": {"kv_cache_group": [], "pack_method": "order"}, "exclude": [],
         "layer_type_quant_config": {}, "layer_quant_config": {}}  # fmt: skip
INT8 = {"dtype": "int8", "qscheme": "per_channel", "symmetric": True, "is_dynamic": False}
FP8 = {**INT8, "dtype": "fp8_e4m3"}
TENSOR = {**FP8, "qscheme": "per_tensor"}
INT4 = {"dtype": "int4", "qscheme": "per_group", "group_size": 128, "symmetric": True}
FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "is_dynamic": False}


def quark(weight: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    return {**QUARK, "global_quant_config": {"weight": weight, "input_tensors": inputs}}


def auto_round(bits: int, sym: bool, packing: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "auto-round", "bits": bits, "group_size": 128, "sym": sym, "data_type": "int",
            "packing_format": f"auto_round:{packing}", **more}  # fmt: skip


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "quark int8": ("quark", quark(INT8, {**INT8, "is_dynamic": True})),
    "quark fp8 dynamic": ("quark", quark(FP8, {**FP8, "is_dynamic": True})),
    "quark fp8 static": ("quark", quark(TENSOR, TENSOR)),
    "quark int4": ("quark", quark(INT4, None)),
    "quark mxfp4": ("quark", quark(FP4, None)),
    "auto-round gptq, symmetric": ("inc", auto_round(4, True, "auto_gptq")),
    "auto-round gptq, asymmetric": ("inc", auto_round(4, False, "auto_gptq")),
    "auto-round gptq, 8 bits": ("inc", auto_round(8, True, "auto_gptq")),
    "auto-round awq, asymmetric": ("inc", auto_round(4, False, "auto_awq")),
    "auto-round awq, symmetric": ("inc", auto_round(4, True, "auto_awq")),
    "auto-round fp8": ("inc", auto_round(8, True, "fp8", group_size=[128, 128], data_type="fp")),
    "auto-round mxfp4": ("inc", auto_round(4, True, "llm_compressor", group_size=32, data_type="mx_fp")),
    "fbgemm_fp8": (
        "fbgemm_fp8", {"quant_method": "fbgemm_fp8", "modules_to_not_convert": [], "activation_scale_ub": 1200.0}
    ),
    "mxfp8": ("mxfp8", {"quant_method": "mxfp8"}),
    "fp8_per_tensor": ("online", {}),
    "fp8_per_channel": ("online", {}),
    "fp8_per_block": ("online", {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def around(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from vllm.config import get_current_vllm_config
    from vllm.platforms import current_platform

    dtype = torch.get_default_dtype()
    with vllm_layers.surroundings(tmp_path_factory.mktemp("vllm")):
        current_platform.import_kernels()
        config = get_current_vllm_config()
        object.__setattr__(config, "model_config", SimpleNamespace(dtype=torch.bfloat16, model="", is_moe=False))
        torch.set_default_dtype(torch.bfloat16)
        yield
        torch.set_default_dtype(dtype)


def multiply(name: str, method: str, config: dict[str, Any]) -> None:
    """One column-parallel linear of vLLM with this config, from its making to its output."""
    from vllm.config.quantization import _ONLINE_SHORTHANDS
    from vllm.model_executor.layers.linear import ColumnParallelLinear
    from vllm.model_executor.layers.quantization import get_quantization_config

    made: Any = get_quantization_config(method)
    quantization = made(_ONLINE_SHORTHANDS[name]) if method == "online" else made.from_config(dict(config))
    layer: Any = ColumnParallelLinear(
        K, N, bias=False, params_dtype=torch.bfloat16, quant_config=quantization, prefix="model.layers.0.mlp.up_proj"
    )
    if method == "online":
        layer.weight.weight_loader(layer.weight, torch.randn(N, K) * 0.02)
    else:
        for parameter in layer.parameters():
            ones = parameter.is_floating_point()
            parameter.data.copy_(torch.full(parameter.shape, float(ones)).to(parameter.dtype))
    layer.quant_method.process_weights_after_loading(layer)
    assert layer(torch.randn(3, K))[0].shape == (3, N)


@pytest.mark.parametrize("name", CASES)
def test_check_and_vllm_agree(around: None, name: str, tmp_path: Path) -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("vLLM is not built for CPUs here")
    method, config = CASES[name]
    checkpoint = Checkpoint.from_tensors(
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
        | ({"quantization_config": config} if config else {})
    )
    (tmp_path / "config.json").write_text("{}")
    model = model_from_source(str(tmp_path))
    named = {"engine_kwargs": {"quantization": name} if method == "online" else {}}
    model = model.model_copy(update={"engine_config": model.engine_config.model_copy(update=named)})
    found = quantserve_validate(checkpoint, model, find_target("cpu"))
    refused = [one.message for one in found if one.severity.value == "error"]
    failure = ""
    try:
        multiply(name, method, config)
    except (ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        failure = str(error)
    assert bool(refused) == bool(failure), f"check says {refused or 'nothing'}, vLLM {failure or 'computes it'}"
