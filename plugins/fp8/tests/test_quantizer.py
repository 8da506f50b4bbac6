"""FP8's quantizer: what it writes, decoded by the bits of E4M3, and what the checks and the kernels make of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.checkpoints import make_llama
from helpers.composed import composed, errors
from helpers.tiny_squeezellm import projections, write_llama
from quantserve.api import Linear
from quantserve_fp8.quantizer import Fp8, Fp8Options
from quantserve_kernels import from_fp8
from quantserve_quantize import Quantized, Statistics
from quantserve_quantize.dequantized import Dequantized
from quantserve_quantize.run import Asked, quantize

SCALES = ("channel", "block", "tensor")


def values(codes: Tensor) -> Tensor:
    """E4M3 by its definition: a sign, four bits of exponent with bias 7, three of mantissa; float32."""
    byte = codes.view(torch.uint8).int()
    exponent, mantissa = byte >> 3 & 15, (byte & 7).float()
    assert not bool(((exponent == 15) & (mantissa == 7)).any()), "NaN"
    size = torch.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * torch.exp2(exponent.float() - 7))
    return torch.where(byte >= 128, -size, size)


def scales_of(tensors: dict[str, Tensor]) -> Tensor:
    """The scale of every weight, [n, k]."""
    if "weight_scale" in tensors:
        return tensors["weight_scale"].expand_as(tensors["weight"])
    return torch.kron(tensors["weight_scale_inv"], torch.ones(128, 128))


def decoded(tensors: dict[str, Tensor]) -> Tensor:
    return values(tensors["weight"]) * scales_of(tensors)


def made(weight: Tensor, scales: str) -> Quantized:
    n, k = weight.shape
    return Fp8(Fp8Options(scales=scales)).quantize(Linear("m", n, k, "column"), weight, Statistics())


@pytest.mark.parametrize("scales", SCALES)
def test_values_are_the_nearest_ones(scales: str) -> None:
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    weight *= torch.logspace(-3, 3, 256)[:, None]
    weight[5] = 0.0
    weight[6] *= 1e-30
    result = made(weight, scales)
    tensors = dict(result.tensors)
    assert torch.equal(result.weight, decoded(tensors))
    kind = "weight_scale_inv" if scales == "block" else "weight_scale"
    packed = from_fp8(tensors["weight"], tensors[kind], (128, 128) if scales == "block" else None)
    assert torch.equal(packed.dequantize(torch.float64).float(), result.weight)
    bytes_ = torch.arange(256, dtype=torch.uint8)
    table = values(bytes_[(bytes_ & 127) < 127])
    scaled = weight / scales_of(tensors)
    error, nearest = (scaled - values(tensors["weight"])).abs(), (scaled[..., None] - table).abs().amin(-1)
    assert float((error - nearest).max()) <= 1e-5 * 448
    assert int(values(tensors["weight"]).abs().max()) >= (224 if scales == "tensor" else 448)


def test_scales_of_tensors_can_be_joined_without_loss() -> None:
    """vLLM rounds the parts of a fused layer to the largest of their scales."""
    large, small = (torch.randn(64, 128, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    parts = [made(large, "tensor"), made(small * 0.07, "tensor")]
    one = torch.stack([part.tensors["weight_scale"] for part in parts]).max()
    for part in parts:
        again = (part.weight / one).to(torch.float8_e4m3fn)
        lost = (values(again) * one - part.weight).abs()
        assert float(lost[(part.weight / one).abs() >= 2.0**-6].max()) == 0


@pytest.mark.parametrize("scales", SCALES)
def test_a_model_passes_its_check(tmp_path: Path, scales: str) -> None:
    source = write_llama(tmp_path / "source", dtype=torch.bfloat16)
    report = quantize(source, tmp_path / "out", Fp8(Fp8Options(scales=scales)), "fp8", Asked())
    assert not errors(composed(tmp_path / "out", "cpu")).keys() - {"tokenizer-missing"}
    on_gpu = errors(composed(tmp_path / "out", "h100")).keys() - {"tokenizer-missing"}
    assert on_gpu == ({"fp8-channel-scales"} if scales == "channel" else set())
    tensors, read = load_file(tmp_path / "out/model.safetensors"), Dequantized(tmp_path / "out", Fp8)
    for module in projections():
        parts = {name.rpartition(".")[2]: one for name, one in tensors.items() if name.startswith(f"{module}.")}
        assert torch.equal(read.finite(f"{module}.weight"), decoded(parts))
        assert 0 < report["layers"][module]["weight_error"] < 0.04


def test_the_config_names_what_stays_unquantized(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "source")
    quantize(source, tmp_path / "out", Fp8(Fp8Options()), "fp8", Asked())
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == ["lm_head"]


def test_blocks_have_to_be_whole() -> None:
    linear = Linear("model.layers.0.self_attn.k_proj", 192, 576, "column")
    assert "not in multiples of 128\n  fix: --scales channel, or tensor" in Fp8(Fp8Options(scales="block")).refusal(
        linear
    )
    assert not Fp8(Fp8Options()).refusal(linear)
