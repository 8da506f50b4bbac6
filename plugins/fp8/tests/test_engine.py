"""FP8 through vLLM's layers and a vLLM engine on a CPU, against transformers on the dequantized weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")
pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.quantization import get_quantization_config

import quantserve_fp8
from helpers.engines import compare, generate
from helpers.plain import write_plain
from helpers.vllm_layers import FUSED, become, engine, load

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="FP8 stays on vLLM's kernels where there is a GPU"),
]
DATA = Path(__file__).parent / "data" / "qwen3-moe-fp8"
PREFIX = "model.layers.3.mlp.down_proj"


_engine = engine(quantserve_fp8.register, VLLM_PLUGINS="fp8")


def config_of(block: bool = False, **changes: Any) -> Any:
    values = {"quant_method": "fp8", "activation_scheme": "dynamic", **changes}
    values |= {"weight_block_size": [128, 128]} if block else {}
    made = get_quantization_config("fp8").from_config(values)
    made.packed_modules_mapping = FUSED
    return made


def weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(torch.float8_e4m3fn)


def test_other_engines_keep_vllms_method() -> None:
    from quantserve_kernels.vllm.asked import asked_for

    assert not asked_for("quantserve-fp8:fp8", {"VLLM_PLUGINS": "other"})
    assert get_quantization_config("fp8").__name__ == "Fp8"


@pytest.mark.parametrize("shape", [(), (1,), (64, 1)])
def test_a_scale_of_a_tensor_or_of_each_channel(shape: tuple[int, ...]) -> None:
    layer = linear.RowParallelLinear(256, 64, bias=False, quant_config=config_of(), prefix=PREFIX)
    values, scale = weight(64, 256), torch.rand(shape) + 0.5
    load(layer, {None: {"weight": values, "weight_scale": scale, "input_scale": torch.tensor([3.0])}})
    x = torch.randn(3, 256)
    assert torch.allclose(layer.quant_method.apply(layer, x), x @ (values.float() * scale).t(), atol=1e-3)


def test_each_fused_tensor_keeps_its_scale() -> None:
    layer = linear.MergedColumnParallelLinear(
        128, [64, 64], bias=False, quant_config=config_of(), prefix="model.layers.0.mlp.gate_up_proj"
    )
    values, scales = weight(128, 128), torch.tensor([0.5, 2.0])
    load(layer, {i: {"weight": values[64 * i : 64 * i + 64], "weight_scale": scales[i]} for i in range(2)})
    x = torch.randn(3, 128)
    expected = x @ (values.float() * scales.repeat_interleave(64)[:, None]).t()
    assert torch.allclose(layer.quant_method.apply(layer, x), expected, atol=1e-3)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_ranks_gets_its_blocks(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    become(monkeypatch, rank, 2)
    values, scales = weight(256, 512), torch.rand(2, 4) + 0.5
    whole = values.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    row = linear.RowParallelLinear(512, 256, bias=False, quant_config=config_of(True), prefix=PREFIX)
    load(row, {None: {"weight": values, "weight_scale_inv": scales}})
    x = torch.randn(3, 256)
    mine = whole[:, 256 * rank : 256 * rank + 256]
    assert torch.allclose(row.quant_method.apply(row, x), x @ mine.t(), atol=1e-3)


def test_nan_is_refused_with_the_layers_name() -> None:
    layer = linear.RowParallelLinear(256, 64, bias=False, quant_config=config_of(), prefix=PREFIX)
    values = weight(64, 256)
    values.view(torch.uint8)[3, 7] = 0xFF
    with pytest.raises(ValueError, match=rf"{PREFIX}: weight holds 1 NaN"):
        load(layer, {None: {"weight": values, "weight_scale": torch.tensor(1.0)}})


def test_a_scale_that_never_arrives() -> None:
    layer = linear.RowParallelLinear(256, 64, bias=False, quant_config=config_of(), prefix=PREFIX)
    with pytest.raises(ValueError, match=rf"lacks {PREFIX}\.weight_scale"):
        load(layer, {None: {"weight": weight(64, 256)}})


def plain(folder: Path, destination: Path) -> Path:
    """A checkpoint in blocks as float32, by transformers."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    op = Fp8Dequantize(SimpleNamespace(quantization_config=None))
    tensors = load_file(folder / "model.safetensors")
    scaled = {name.removesuffix("_scale_inv") for name in tensors if name.endswith("_scale_inv")}
    weights = {
        name: op._dequantize_one(tensor, tensors[f"{name}_scale_inv"], torch.float32) if name in scaled else tensor
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }
    return write_plain(folder, destination, weights)


@pytest.mark.slow
def test_an_engine_gives_the_tokens_of_transformers(tmp_path: Path) -> None:
    """Linears and experts in blocks."""
    generations = generate(DATA, "fp8", tmp_path / "out.json", dtype="bfloat16", enforce_eager=True)
    compare(plain(DATA, tmp_path / "plain"), generations, clear=0.2, close=0.3)
