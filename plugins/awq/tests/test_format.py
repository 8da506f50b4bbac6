"""The AWQ tensor layout: published vectors, round trips and error bounds."""

from __future__ import annotations

import pytest
import torch

from quantserve_awq._format import dequantize_linear, pack, quantize_linear, unpack


def test_nibble_order_vector() -> None:
    assert pack(torch.arange(8).reshape(1, 8)).item() == 0x75316420


def test_words_above_the_sign_bit() -> None:
    columns = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 15]])
    assert pack(columns).item() & 0xFFFFFFFF == 0xF0000000
    assert torch.equal(unpack(pack(columns)), columns.to(torch.int32))


def test_pack_round_trip() -> None:
    values = torch.randint(0, 16, (37, 64), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    assert pack(values).shape == (37, 8)
    assert torch.equal(unpack(pack(values)), values)


def test_dequantize_by_hand() -> None:
    codes = torch.zeros(4, 8, dtype=torch.int32)
    codes[3, 5] = 9
    zeros = torch.full((2, 8), 7, dtype=torch.int32)
    scales = torch.tensor([[1.0] * 8, [0.5] * 8], dtype=torch.float16)
    weight = dequantize_linear(pack(codes), pack(zeros), scales)
    assert weight.shape == (8, 4)  # [n, k]
    assert weight[5, 3] == (9 - 7) * 0.5
    assert weight[5, 2] == -7 * 0.5
    assert weight[0, 0] == -7.0


@pytest.mark.parametrize(("n", "k", "group"), [(256, 256, 128), (128, 384, 64), (8, 96, 32), (64, 160, -1)])
def test_quantization_error_is_half_a_step(n: int, k: int, group: int) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(k)) * 0.05
    packed = quantize_linear(weight, group)
    width = k if group == -1 else group
    assert packed.qweight.shape == (k, n // 8)
    assert packed.qweight.dtype == torch.int32
    assert packed.qzeros.shape == (k // width, n // 8)
    assert packed.scales.shape == (k // width, n)
    assert packed.scales.dtype == torch.float16
    error = (dequantize_linear(*packed) - weight).abs().reshape(n, k // width, width)
    step = packed.scales.T.float().unsqueeze(-1)
    # Half a step of rounding; the ends may lose another half to the rounded zero point, and float16 rounds the step.
    assert (error <= step * 1.01).all()
    assert error.mean() < 0.26 * step.mean()


@pytest.mark.parametrize("sign", [1, -1])
def test_group_of_one_sign_is_not_clipped(sign: int) -> None:
    weight = sign * torch.linspace(0.9, 1.0, 32).repeat(8, 1)
    packed = quantize_linear(weight, 32)
    assert torch.allclose(dequantize_linear(*packed), weight, atol=1.0 / 15 / 2 + 1e-3)


def test_zeros_stay_zero() -> None:
    assert torch.equal(dequantize_linear(*quantize_linear(torch.zeros(8, 32), 32)), torch.zeros(8, 32))


@pytest.mark.parametrize(("n", "k", "words"), [(8, 100, "in_features 100"), (12, 128, "out_features 12")])
def test_shapes_that_cannot_be_packed(n: int, k: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quantize_linear(torch.zeros(n, k), 128 if k == 128 else 64)
