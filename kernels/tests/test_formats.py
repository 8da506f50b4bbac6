"""Checkpoint layouts, packed here bit by bit from their descriptions, through the package's readers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import quantserve_kernels as kernels


def _stream_by_the_book(codes: list[list[int]], bits: int) -> torch.Tensor:
    """int32 words [k*bits/32, n]: each column's codes as one little-endian integer, cut into words."""
    columns = []
    for channel in codes:
        number = sum(code << bits * i for i, code in enumerate(channel))
        columns.append([number >> 32 * w & 0xFFFFFFFF for w in range(len(channel) * bits // 32)])
    words = torch.tensor(columns, dtype=torch.int64).t()
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _awq_by_the_book(codes: list[list[int]]) -> torch.Tensor:
    """int32 words [rows, columns/8]: nibble i of word c is column 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    rows = [[sum(row[c + order[i]] << 4 * i for i in range(8)) for c in range(0, len(row), 8)] for row in codes]
    words = torch.tensor(rows, dtype=torch.int64)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _random(rows: int, columns: int, bits: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", kernels.BITS)
def test_squeezellm(bits: int) -> None:
    codes = _random(21, 96, bits, 1)
    table = torch.randn(21, 2**bits)
    extra = torch.zeros(21, 96)
    extra[3, 5], extra[20, 95] = 2.5, -1.0
    rows = torch.tensor([0, 0, 0, 0, *([1] * 17), 2], dtype=torch.int32)
    sparse = (rows, torch.tensor([5, 95], dtype=torch.int32), torch.tensor([2.5, -1.0]))
    weight = kernels.from_squeezellm(_stream_by_the_book(codes.tolist(), bits), table, sparse)
    assert torch.equal(weight.dequantize(), torch.gather(table, 1, codes) + extra)


def test_vectors_of_the_specification() -> None:
    four = torch.tensor([[0x76543210], [0xFEDCBA98 - 2**32]], dtype=torch.int32)
    assert kernels.unpack_stream(four, 4).tolist() == [list(range(16))]
    three = torch.tensor([[0xC0000000 - 2**32], [0x80000001 - 2**32], [3]], dtype=torch.int32)
    assert kernels.unpack_stream(three, 3).tolist() == [[7 if k in (10, 21) else 0 for k in range(32)]]


@pytest.mark.parametrize("group", [32, 64, 128])
def test_awq(group: int) -> None:
    k, n = 128, 24
    codes, zeros = _random(k, n, 4, 2), _random(k // group, n, 4, 3)
    scales = (torch.rand(k // group, n) + 0.1).half()
    weight = kernels.from_awq(_awq_by_the_book(codes.tolist()), _awq_by_the_book(zeros.tolist()), scales)
    expected = (codes - zeros.repeat_interleave(group, 0)).double() * scales.double().repeat_interleave(group, 0)
    assert torch.equal(weight.dequantize(torch.float64), expected.t())
    assert _awq_by_the_book([[0, 1, 2, 3, 4, 5, 6, 7]]).item() == 0x75316420


@pytest.mark.parametrize("bits", kernels.BITS)
@pytest.mark.parametrize("offset", [0, 1])
def test_gptq(bits: int, offset: int) -> None:
    k, n, group = 128, 32, 64
    codes, zeros = _random(n, k, bits, 4), _random(k // group, n, bits, 5)
    scales = (torch.rand(k // group, n) + 0.1).half()
    weight = kernels.from_gptq(
        _stream_by_the_book(codes.tolist(), bits),
        _stream_by_the_book(zeros.tolist(), bits).t().contiguous(),
        scales,
        bits=bits,
        zero_offset=offset,
        g_idx=torch.arange(k, dtype=torch.int32) // group,
    )
    spread = (zeros + offset).t().repeat_interleave(group, 1)
    expected = (codes - spread).double() * scales.double().t().repeat_interleave(group, 1)
    assert torch.equal(weight.dequantize(torch.float64), expected)


def test_one_channel_or_one_word_may_have_any_stride() -> None:
    """Such tensors are contiguous for torch whatever the stride of their dimension of 1."""
    words = torch.arange(16, dtype=torch.int32)[:, None]
    strange = torch.as_strided(words.clone(), (16, 1), (1, 5))
    table = torch.randn(1, 16)
    expected = kernels.from_squeezellm(words, table).dequantize()
    assert torch.equal(kernels.from_squeezellm(strange, table).dequantize(), expected)
    zeros, scales = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 8).half()
    expected = kernels.from_awq(words, zeros, scales).dequantize()
    assert torch.equal(kernels.from_awq(strange, zeros, scales).dequantize(), expected)


def test_the_order_of_sparse_entries_does_not_matter() -> None:
    codes, table = torch.zeros(2, 4096, dtype=torch.uint8), torch.zeros(2, 16)
    rows, cols = torch.tensor([0, 3, 4]), torch.tensor([4095, 0, 2050, 7])
    weight = kernels.pack(codes, table, bits=4, sparse=(rows, cols, torch.tensor([1.0, 2.0, 3.0, 4.0])))
    expected = torch.zeros(2, 4096)
    expected[0, 4095], expected[0, 0], expected[0, 2050], expected[1, 7] = 1, 2, 3, 4
    for m in (1, 5):
        x = torch.randn(m, 4096)
        assert torch.allclose(kernels.linear(x, weight), x @ expected.t(), atol=1e-5)


def test_fp4_through_the_same_door() -> None:
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = _random(5, 64, 4, 6)
    absmax = torch.rand(10) + 0.5
    octets = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    weight = kernels.from_nf4(octets, absmax, (5, 64), values)
    assert torch.equal(weight.dequantize(), values[codes] * absmax.view(5, 2).repeat_interleave(32, 1))


def test_the_codes_of_a_layer_are_unpacked_some_channels_at_a_time() -> None:
    asked: list[tuple[int, int]] = []

    def channels(first: int, last: int) -> torch.Tensor:
        asked.append((first, last))
        return torch.full((last - first, 64), first // 512, dtype=torch.uint8)

    weight = kernels.pack(channels, torch.arange(16.0)[None], bits=4, shape=(1300, 64))
    assert asked == [(0, 512), (512, 1024), (1024, 1300)]
    assert weight.dequantize()[[0, 511, 512, 1023, 1024, 1299], 63].tolist() == [0, 0, 1, 1, 2, 2]
    assert weight.nbytes == 1312 * 64 // 2 + 64  # whole tiles of 16 channels


def _python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_status_needs_no_torch_and_tells_what_will_run() -> None:
    code = (
        "import sys, json, quantserve_kernels as k; s = k.status(); assert 'torch' not in sys.modules; "
        "print(json.dumps([s.native, s.instruction_set, s.reason, k.instruction_set()]))"
    )
    native, said, reason, used = json.loads(_python(code))
    assert said == used
    assert native == (reason == "")
    if native:
        assert json.loads(_python(code, QUANTSERVE_KERNELS_ISA="portable"))[1::2] == ["portable", "portable"]


def test_without_the_compiled_library_plain_torch_answers_and_the_status_says_why() -> None:
    code = (
        "import quantserve_kernels._status as s; s.library = lambda: None\n"
        "import quantserve_kernels as k, torch; from quantserve_kernels import _ops; _ops.library = s.library\n"
        "w = k.pack(torch.randint(0, 16, (9, 70), dtype=torch.uint8), torch.randn(9, 16), bits=4)\n"
        "x = torch.randn(2, 70); y = torch.compile(lambda x: k.linear(x, w), fullgraph=True, backend='eager')(x)\n"
        "assert torch.allclose(y, x @ w.dequantize().t(), atol=1e-4)\n"
        "print(k.status().native, k.status().instruction_set, k.instruction_set(), bool(k.status().reason))"
    )
    assert _python(code).split() == ["False", "torch", "torch", "True"]


def test_only_one_openmp_runtime_is_loaded() -> None:
    code = (
        "import torch, quantserve_kernels as k; k.load()\n"
        "maps = open('/proc/self/maps').read().splitlines()\n"
        "print(len({l.split()[-1] for l in maps if 'libgomp' in l or 'libiomp' in l or 'libomp' in l}))"
    )
    assert int(_python(code)) == 1


def _float8(dtype: torch.dtype, n: int, k: int, seed: int = 7) -> torch.Tensor:
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_scaled_as_a_whole_or_by_row(dtype: torch.dtype) -> None:
    weight, rows = _float8(dtype, 600, 48), torch.rand(600) + 0.5
    assert torch.equal(kernels.from_fp8(weight, rows[:, None]).dequantize(), weight.float() * rows[:, None])
    assert torch.equal(kernels.from_fp8(weight, rows[0]).dequantize(), weight.float() * rows[0])


@pytest.mark.parametrize(("n", "k"), [(256, 384), (130, 320), (7, 96), (300, 136)])
def test_fp8_blocks_of_which_the_last_may_be_smaller(n: int, k: int) -> None:
    weight, scales = _float8(torch.float8_e4m3fn, n, k), torch.rand(-(-n // 128), -(-k // 128)) + 0.5
    row, column = torch.arange(n) // 128, torch.arange(k) // 128
    expected = weight.float() * scales[row][:, column]
    assert torch.equal(kernels.from_fp8(weight, scales, (128, 128)).dequantize(), expected)


@pytest.mark.parametrize(("dtype", "code"), [("float8_e4m3fn", 0xFF), ("float8_e5m2", 0x7C), ("float8_e5m2", 0xFE)])
def test_fp8_that_is_not_finite_is_refused_with_its_rows(dtype: str, code: int) -> None:
    weight = _float8(getattr(torch, dtype), 600, 32)
    weight.view(torch.uint8)[550, 3] = code
    with pytest.raises(ValueError, match="1 NaN or infinities in out_features 512 to 599"):
        kernels.from_fp8(weight, torch.ones(1))


def test_fp8_scales_of_another_shape() -> None:
    weight = _float8(torch.float8_e4m3fn, 256, 128)
    with pytest.raises(ValueError, match=r"\[2, 2\], expected \[2, 1\] of 128 x 128"):
        kernels.from_fp8(weight, torch.ones(2, 2), (128, 128))
    with pytest.raises(ValueError, match="one for each of 256 rows"):
        kernels.from_fp8(weight, torch.ones(2))


@pytest.mark.parametrize("group", [16, 32])
def test_fp4(group: int) -> None:
    codes, scales = _random(40, 96, 4, 8).to(torch.uint8), torch.rand(40, 96 // group) + 0.5
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = magnitudes[(codes & 7).long()] * torch.where(codes >= 8, -1.0, 1.0)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    expected = (values.view(40, -1, group) * scales[:, :, None]).view(40, 96)
    assert torch.equal(kernels.from_fp4(packed, scales).dequantize(), expected)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(0.1251220703125, torch.float16), (2.0**-40, torch.bfloat16), (0.1, torch.float32)],
    ids=["float16", "bfloat16", "neither"],
)
@pytest.mark.parametrize("n", [1, 16])
def test_scales_take_16_bits_where_these_hold_them(scale: float, dtype: torch.dtype, n: int) -> None:
    codes, zeros = _random(16, 64, 4, 9).to(torch.uint8), torch.full((16, 2), 3.0)
    table = torch.arange(16.0).expand(n, -1)
    weight = kernels.pack(codes, table, bits=4, scales=torch.full((16, 2), scale), zeros=zeros, group_size=32)
    assert weight.scales is not None
    assert weight.zeros is not None
    assert weight.scales.dtype == weight.zeros.dtype == dtype
    assert torch.equal(weight.dequantize(), (codes.float() - 3) * torch.tensor(scale))


def test_weights_with_scales_of_different_width_are_one() -> None:
    codes = _random(16, 32, 4, 10).to(torch.uint8)
    parts = [
        kernels.pack(codes, torch.arange(16.0)[None], bits=4, scales=torch.full((16, 1), scale)) for scale in (0.5, 0.1)
    ]
    both = kernels.concatenate(parts)
    assert torch.equal(both.dequantize(), torch.cat([part.dequantize() for part in parts]))
