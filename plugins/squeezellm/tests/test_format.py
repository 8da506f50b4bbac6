"""The format itself: test vectors of the specification, round trips, and the operator against the definition."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantserve_kernels import pack_stream, unpack_stream
from quantserve_squeezellm import _packing


def _words(codes: list[int], bits: int) -> list[int]:
    return [word & 0xFFFFFFFF for word in pack_stream(torch.tensor([codes]), bits)[:, 0].tolist()]


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (4, [k % 16 for k in range(32)], [0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98]),
        (3, [k % 8 for k in range(32)], [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        (3, [7 if k in (10, 21) else 0 for k in range(32)], [0xC0000000, 0x80000001, 0x00000003]),
    ],
)
def test_the_vectors_of_the_specification(bits: int, codes: list[int], words: list[int]) -> None:
    assert _words(codes, bits) == words
    packed = pack_stream(torch.tensor([codes]), bits)
    assert unpack_stream(packed, bits).tolist() == [codes]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([3, 4]), st.integers(1, 9), st.integers(1, 6), st.integers(0, 2**31))
def test_packing_is_a_little_endian_bit_stream_and_unpacking_undoes_it(
    bits: int, n: int, blocks: int, seed: int
) -> None:
    codes = torch.randint(0, 2**bits, (n, 32 * blocks), generator=torch.Generator().manual_seed(seed))
    packed = pack_stream(codes, bits)
    assert packed.shape == (blocks * bits, n)
    assert packed.dtype == torch.int32
    assert torch.equal(unpack_stream(packed, bits).long(), codes)
    stream = sum((word & 0xFFFFFFFF) << (32 * w) for w, word in enumerate(packed[:, -1].tolist()))
    assert [(stream >> (bits * k)) % 2**bits for k in range(32 * blocks)] == codes[-1].tolist()


@pytest.mark.parametrize(("bits", "k"), [(4, 12), (3, 8), (3, 48)])
def test_codes_that_do_not_fill_whole_words_are_refused(bits: int, k: int) -> None:
    with pytest.raises(ValueError, match="multiple of"):
        pack_stream(torch.zeros(2, k, dtype=torch.int64), bits)


def test_codes_too_large_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.8 do not fit 3 bits"):
        pack_stream(torch.tensor([[8] + [0] * 31]), 3)


def _layer(bits: int, n: int, k: int, seed: int, full: bool) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    sparse = torch.randn(n, k, generator=g) * (torch.rand(n, k, generator=g) < 0.05)
    tensors = {
        "qweight": pack_stream(torch.randint(0, 2**bits, (n, k), generator=g), bits),
        "lookup_table": torch.randn(n, 2**bits, generator=g),
        **_packing.to_csr(sparse),
    }
    if full:
        tensors["full_rows"] = torch.randn(k, 3, generator=g)
        tensors["full_row_indices"] = torch.tensor([n - 1, 0, n - 1], dtype=torch.int32)
    return tensors


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([3, 4]), st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**31), st.booleans())
def test_dequantize_follows_the_definition_term_by_term(bits: int, n: int, blocks: int, seed: int, full: bool) -> None:
    k = 32 * blocks
    tensors = _layer(bits, n, k, seed, full)
    weight = _packing.dequantize(tensors, torch.float64)
    codes = unpack_stream(tensors["qweight"], bits)
    rows = tensors["rows"].tolist()
    for channel in {0, n // 2, n - 1}:
        expected = [float(tensors["lookup_table"][channel, code]) for code in codes[channel].tolist()]
        for i in range(rows[channel], rows[channel + 1]):
            expected[int(tensors["cols"][i])] += float(tensors["vals"][i])
        for j, target in enumerate(tensors["full_row_indices"].tolist() if full else []):
            if target == channel:
                expected = [w + float(tensors["full_rows"][i, j]) for i, w in enumerate(expected)]
        assert weight[channel].tolist() == pytest.approx(expected, abs=1e-6)
