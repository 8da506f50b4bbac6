"""NF4's quantizer: the nearest values, in files that the checks, the kernels and an independent decoder read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.composed import composed, errors
from helpers.tiny_squeezellm import projections, write_llama
from quantserve.api import Linear
from quantserve_bitsandbytes.quantizer import Nf4, Nf4Options
from quantserve_kernels import from_nf4
from quantserve_quantize import Statistics
from quantserve_quantize.dequantized import Dequantized
from quantserve_quantize.run import Asked, quantize

DATA = Path(__file__).parent / "data" / "nf4"
STATE = "weight.quant_state.bitsandbytes__nf4"


def decoded(tensors: dict[str, Tensor]) -> Tensor:
    """W [n, k]: the first of two codes in the high half of a byte, in blocks of 64."""
    table, absmax = tensors["weight.quant_map"].tolist(), tensors["weight.absmax"].tolist()
    octets = tensors["weight"].view(-1).tolist()
    codes = [code for octet in octets for code in (octet // 16, octet % 16)]
    values = [table[code] for code in codes]
    scales = [absmax[place // 64] for place in range(len(codes))]
    shape = json.loads(bytes(tensors[STATE].tolist()))["shape"]
    return (torch.tensor(values) * torch.tensor(scales)).view(shape)


def test_codes_are_the_nearest_ones() -> None:
    weight = torch.randn(32, 192, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[3] = 0.0
    weight[4, :64] = -1e-3
    made = Nf4(Nf4Options()).quantize(Linear("m", 32, 192, "column"), weight, Statistics())
    tensors = dict(made.tensors)
    assert torch.equal(made.weight, decoded(tensors))
    assert bool((made.weight[3] == 0).all())
    assert torch.equal(made.weight[4, :64], weight[4, :64])
    packed = from_nf4(tensors["weight"], tensors["weight.absmax"], (32, 192), tensors["weight.quant_map"])
    assert torch.allclose(packed.dequantize(torch.float64).float(), made.weight, rtol=1e-6, atol=0)
    table, absmax = tensors["weight.quant_map"], tensors["weight.absmax"].view(32, 3).repeat_interleave(64, 1)
    nearest = (weight[..., None] - table * absmax[..., None]).abs().amin(-1)
    assert torch.allclose((weight - made.weight).abs(), nearest, atol=1e-8)


def test_the_table_and_the_state_are_those_of_bitsandbytes() -> None:
    theirs = load_file(DATA / "model.safetensors")
    module = "model.layers.0.mlp.up_proj"
    n, k = json.loads(bytes(theirs[f"{module}.{STATE}"].tolist()))["shape"]
    tensors = Nf4(Nf4Options()).quantize(Linear(module, n, k, "column"), torch.randn(n, k), Statistics()).tensors
    assert torch.equal(tensors["weight.quant_map"], theirs[f"{module}.weight.quant_map"])
    assert tensors["weight"].shape == theirs[f"{module}.weight"].shape
    assert tensors["weight.absmax"].shape == theirs[f"{module}.weight.absmax"].shape


def test_a_model_passes_its_check(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", dtype=torch.bfloat16)
    report = quantize(source, tmp_path / "out", Nf4(Nf4Options()), "bitsandbytes", Asked())
    for target in ("cpu", "h100"):
        assert not errors(composed(tmp_path / "out", target)).keys() - {"tokenizer-missing"}
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == ["lm_head"]
    tensors, read = load_file(tmp_path / "out/model.safetensors"), Dequantized(tmp_path / "out", Nf4)
    for module in list(projections())[:2]:
        parts = {name.removeprefix(f"{module}."): one for name, one in tensors.items() if name.startswith(module)}
        assert torch.equal(read.finite(f"{module}.weight"), decoded(parts))
        assert 0 < report["layers"][module]["weight_error"] < 0.1


def test_blocks_have_to_divide_rows() -> None:
    assert "K is 96, which blocks of 64 do not divide" in Nf4(Nf4Options()).refusal(Linear("m", 64, 96, "column"))
