"""HQQ's quantizer: files in hqq's layout, decoded independently, with smaller errors than plain rounding."""

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
from quantserve_hqq.quantizer import Hqq, HqqOptions, fitted
from quantserve_quantize import Statistics
from quantserve_quantize.dequantized import Dequantized
from quantserve_quantize.run import Asked, quantize

DATA = Path(__file__).parent / "data" / "uniform4"
PER_WORD = {2: 4, 3: 10, 4: 2, 8: 1}


def decoded(tensors: dict[str, Tensor], bits: int) -> Tensor:
    """W [n, k]: group g is field g // rows, counted from the highest one in use, of row g % rows of the words."""
    scale, zero, packed = tensors["scale"].float(), tensors["zero"].float(), tensors["W_q"].long()
    rows, groups = len(packed), []
    for g in range(len(scale)):
        field = PER_WORD[bits] - 1 - g // rows
        groups.append(((packed[g % rows] >> (field * bits)) % 2**bits - zero[g]).float() * scale[g])
    return torch.stack(groups).view(tensors["shape"].tolist())


@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_files_stand_for_the_weight_that_was_meant(bits: int, group: int) -> None:
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[3] = 0.0
    linear = Linear("m", 48, 96, "column")
    quantizer = Hqq(HqqOptions(bits=bits, group_size=group))
    assert not quantizer.refusal(linear)
    made = quantizer.quantize(linear, weight, Statistics())
    assert torch.equal(made.weight, decoded(dict(made.tensors), bits))
    step = made.tensors["scale"].float().view(48, -1).repeat_interleave(96 if group == -1 else group, 1)
    assert float(((weight - made.weight).abs() / step).max()) < 2**bits / 2


def test_fitted_zeros_lower_what_they_are_fitted_to() -> None:
    """Heavy tails, whose outliers a plain mean would follow."""
    made = torch.distributions.StudentT(3.0)
    torch.manual_seed(0)
    groups = made.sample((400, 64)) * 0.02
    scale, zero = fitted(groups, 15)

    def loss(zeros: Tensor) -> float:
        codes = (groups / scale + zeros).round().clamp(0, 15)
        return float((groups - (codes - zeros) * scale).abs().pow(0.7).sum())

    assert loss(zero) < 0.98 * loss(-groups.amin(1, keepdim=True) / scale)


def test_the_tensors_beside_a_linear_are_those_of_hqq() -> None:
    theirs, module = load_file(DATA / "model.safetensors"), "model.layers.0.mlp.up_proj"
    n, k = theirs[f"{module}.shape"].tolist()
    quantizer = Hqq(HqqOptions(group_size=32))
    quantizer.source_dtype = "float16"
    tensors = quantizer.quantize(Linear(module, n, k, "column"), torch.randn(n, k) * 0.1, Statistics()).tensors
    parts = {name.removeprefix(f"{module}."): one for name, one in theirs.items() if name.startswith(module)}
    assert tensors.keys() == parts.keys()
    for name, one in parts.items():
        assert (tensors[name].dtype, tensors[name].shape) == (one.dtype, one.shape), name
        if name not in ("W_q", "scale", "zero", "round_zero"):
            assert torch.equal(tensors[name], one), name
    config = json.loads((DATA / "config.json").read_text())["quantization_config"]
    ours = quantizer.quantization_config({})
    assert ours.keys() == config.keys()
    assert ours["quant_config"].keys() == config["quant_config"].keys()
    found = Hqq.dequantize(parts, config)
    expected = load_file(DATA.parent / "uniform4-dequantized.safetensors")[module].float()
    assert torch.allclose(found, expected, rtol=2e-3, atol=1e-5)  # hqq computes in float16


def test_a_model_passes_its_check(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", dtype=torch.bfloat16)
    report = quantize(source, tmp_path / "out", Hqq(HqqOptions()), "hqq", Asked())
    assert not errors(composed(tmp_path / "out", "cpu")).keys() - {"tokenizer-missing"}
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["skip_modules"] == ["lm_head"]
    tensors, read = load_file(tmp_path / "out/model.safetensors"), Dequantized(tmp_path / "out", Hqq)
    for module in list(projections())[:2]:
        parts = {name.removeprefix(f"{module}."): one for name, one in tensors.items() if name.startswith(module)}
        assert torch.equal(read.finite(f"{module}.weight"), decoded(parts, 4))
        assert 0 < report["layers"][module]["weight_error"] < 0.12


def test_groups_have_to_divide_rows() -> None:
    linear = Linear("m", 64, 96, "column")
    assert "groups of 64 do not divide K = 96\n  fix: --group-size 32, or -1" in Hqq(HqqOptions()).refusal(linear)
