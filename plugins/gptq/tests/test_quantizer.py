"""GPTQ's quantizer: what it writes, decoded independently, and what it gains over rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.composed import composed, errors
from helpers.tiny_squeezellm import projections, write_llama
from helpers.tokenizer import write_words
from quantserve.api import Linear
from quantserve.errors import UsageError
from quantserve_gptq._packing import pack_linear
from quantserve_gptq.quantizer import GPTQ, GPTQOptions
from quantserve_quantize import Quantized, Statistics
from quantserve_quantize.dequantized import Dequantized
from quantserve_quantize.hessian import inverse_factor
from quantserve_quantize.run import Asked, quantize

N, K = 96, 256


def linear(n: int = N, k: int = K) -> Linear:
    return Linear("model.layers.0.mlp.up_proj", n, k, "column")


def weight_and_hessian(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the Hessian of inputs that are sums of a few and of different sizes."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(2000, 40, generator=made) @ torch.randn(40, K, generator=made)
    x = (x + torch.randn(2000, K, generator=made)) * torch.rand(K, generator=made)
    return torch.randn(N, K, generator=made) * 0.05, x.t() @ x / len(x)


def made(weight: Tensor, hessian: Tensor, **options: Any) -> tuple[GPTQ, Quantized]:
    quantizer = GPTQ(GPTQOptions(**options))
    return quantizer, quantizer.quantize(linear(*weight.shape), weight, Statistics(hessian=hessian))


def decoded(tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """W [n, k] in float32 from bit streams, by the format's definition: stored zeros are one less than zeros are."""
    bits = config["bits"]

    def stream(words: Tensor) -> Tensor:
        every = torch.stack([(words.long() >> bit) & 1 for bit in range(32)], -1).reshape(len(words), -1, bits)
        return (every << torch.arange(bits)).sum(-1)

    group = tensors["g_idx"].long()
    zeros = stream(tensors["qzeros"]) + 1
    assert int(zeros.max()) < 2**bits
    assert not config["sym"] or bool((zeros == 2 ** (bits - 1)).all())
    return (stream(tensors["qweight"].t()) - zeros.t()[:, group]).float() * tensors["scales"].t()[:, group].float()


def loss(weight: Tensor, found: Tensor, hessian: Tensor) -> float:
    error = (weight - found).double()
    return float((error @ hessian.double() * error).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", [{"sym": False}, {"act_order": "on"}, {"group_size": -1}], ids=str)
def test_files_stand_for_the_weight_that_was_meant(bits: int, options: dict[str, Any]) -> None:
    """In float16 and in bfloat16, in this file's decoder and in the kernels."""
    weight, hessian = weight_and_hessian()
    weight[3], weight[4, :64] = 0.0, 0.7  # a channel of zeros, and a group of one value
    quantizer, result = made(weight, hessian, bits=bits, **{"group_size": 64, **options})
    tensors, config = dict(result.tensors), quantizer.quantization_config({})
    assert torch.equal(result.weight, decoded(tensors, config))
    assert bool((result.weight[3] == 0).all()) or not quantizer.options.sym
    narrow = tensors | {"scales": tensors["scales"].bfloat16()}
    assert torch.equal(result.weight, decoded(narrow, config))
    packed, order = pack_linear(**narrow, bits=bits, sym=config["sym"], zero_offset=1)
    found = packed.dequantize(torch.float64).float()
    assert torch.equal(result.weight if order is None else result.weight[:, order], found)
    assert (order is not None) == config["desc_act"] == (options.get("act_order") == "on")


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_the_outputs_err_less_than_those_of_rounding(bits: int, sym: bool) -> None:
    """Inputs without correlations are plain rounding: their Hessian is diagonal."""
    weight, hessian = weight_and_hessian()
    _, plain = made(weight, torch.eye(K), bits=bits, group_size=64, sym=sym, act_order="off", scales="max")
    scales = plain.tensors["scales"].t().float().repeat_interleave(64, 1)
    inside = (weight / scales).abs() < 2 ** (bits - 1) - 1 if sym else torch.ones_like(weight, dtype=torch.bool)
    assert float(((plain.weight - weight).abs() / scales.abs())[inside].max()) <= (0.5001 if sym else 1.0)
    rounding = loss(weight, plain.weight, hessian)
    found = {
        order: loss(
            weight, made(weight, hessian, bits=bits, group_size=64, sym=sym, act_order=order)[1].weight, hessian
        )
        for order in ("off", "static", "on")
    }
    assert max(found.values()) < 0.5 * rounding
    assert found["static"] < found["off"]
    _, largest = made(weight, hessian, bits=bits, group_size=64, sym=sym, scales="max")
    assert found["static"] < loss(weight, largest.weight, hessian)


def test_errors_are_spread_as_the_paper_does() -> None:
    """Each input in turn, with the inverse of the remaining Hessian, in float64: GPTQ without blocks and Cholesky."""
    weight, hessian = weight_and_hessian()
    _, result = made(weight, hessian, group_size=-1, act_order="off", scales="max", damp=0.01)
    scale, left = result.tensors["scales"][0].double(), weight.double().clone()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(K)
    expected = torch.empty_like(left)
    for i in range(K):
        inverse = torch.linalg.inv(damped[i:, i:])
        code = (left[:, i] / scale + 8).round().clamp(0, 15)
        expected[:, i] = (code - 8) * scale
        left[:, i:] -= ((left[:, i] - expected[:, i]) / inverse[0, 0])[:, None] * inverse[0]
    same = (expected - result.weight).abs() < 1e-6
    assert float(same.double().mean()) > 0.99  # a tie in float32 may go the other way, and what follows with it
    assert loss(weight, result.weight, hessian) == pytest.approx(loss(weight, expected.float(), hessian), rel=0.02)


def test_few_tokens_do_not_make_codes_fit_them() -> None:
    """Judged by other inputs of the same kind, in float64."""
    generator = torch.Generator().manual_seed(2)
    sizes = torch.arange(1, K + 1)[:, None] ** -0.5
    x = torch.randn(4300, K, generator=generator) @ (sizes * torch.linalg.qr(torch.randn(K, K, generator=generator))[0])
    weight, few, others = torch.randn(N, K, generator=generator) * 0.05, x[:300], x[300:]
    quantizer = GPTQ(GPTQOptions(group_size=64))
    errors = []
    for tokens in (None, len(few)):
        statistics = Statistics(hessian=few.t() @ few / len(few), tokens=tokens)
        found = quantizer.quantize(linear(), weight, statistics).weight
        errors.append(loss(weight, found, others.t() @ others / len(others)))
    assert errors[1] < 0.85 * errors[0]


def test_inputs_that_are_always_zero_and_too_few_tokens() -> None:
    weight, _ = weight_and_hessian()
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(1)) * 30
    x[:, 7] = 0
    hessian = x.t() @ x / 5
    factor = inverse_factor(hessian, 1e-6)
    assert bool(factor.isfinite().all())
    _, result = made(weight, hessian, group_size=32, damp=1e-6)
    assert bool(result.weight.isfinite().all())
    assert float((weight - result.weight)[:, 7].abs().max()) < 0.03


@pytest.mark.parametrize(
    ("options", "n", "k", "message"),
    [
        ({"group_size": 128}, 64, 576, "128 do not divide K = 576\n  fix: --group-size 32, or 64, or -1"),
        ({"bits": 3, "group_size": 32}, 40, 64, r"\[40, 64\], not in multiples of 32"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(options: dict[str, Any], n: int, k: int, message: str) -> None:
    assert message.replace("\\", "") in GPTQ(GPTQOptions(**options)).refusal(linear(n, k))
    with pytest.raises(UsageError, match="group_size is 48; expected one of 32, 64, 128, -1"):
        GPTQ(GPTQOptions(group_size=48))


@pytest.mark.parametrize("options", [{}, {"sym": False, "act_order": "on"}], ids=str)
def test_a_model_passes_its_check(tmp_path: Path, options: dict[str, Any]) -> None:
    source = write_llama(tmp_path / "source", dtype=torch.bfloat16)
    write_words(source, 97)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number * number % 97}" for number in range(2000)))
    report = quantize(source, tmp_path / "out", GPTQ(GPTQOptions(**options)), "gptq", Asked(text, 4, 64))
    assert not errors(composed(tmp_path / "out"))
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    read = Dequantized(tmp_path / "out", GPTQ)
    for module in projections():
        parts = {suffix: after[f"{module}.{suffix}"] for suffix in ("qweight", "qzeros", "scales", "g_idx")}
        found, weight = decoded(parts, config), before[f"{module}.weight"].float()
        assert torch.equal(read.finite(f"{module}.weight"), found)
        layer = report["layers"][module]
        assert layer["weight_error"] == pytest.approx(float((weight - found).norm() / weight.norm()), rel=1e-4)
        assert layer["output_error"] < layer["weight_error"] < 0.3
