"""The CPU kernels of every instruction set against float64: formats, widths, dtypes, odd shapes, few rows and many."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import quantserve_kernels as kernels
from kernel_cases import Case, affine, codebook, fp8, grouped_codebook, nf4, relative_error
from quantserve_kernels import _fallback, _ops
from quantserve_kernels._arguments import EXPERTS, LINEAR, numbers_of, tensors_of

ISAS = _ops.instruction_sets()
ROWS = (0, 1, 2, 3, 5, 7, 8, 18, 33)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What a result may be off by: in bfloat16 the weight, its sparse addition and the result are each rounded by 2^-8.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 3 * 2**-8, torch.float16: 2**-10}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.instruction_set()
    if before != "torch":
        kernels.instruction_set(request.param)
    yield request.param
    if before != "torch":
        kernels.instruction_set(before)


def _odd(bits: int) -> list[Case]:
    """Shapes with nothing to divide by: one channel, tails of tiles, blocks and groups, groups that are no vector."""
    return [
        codebook(1, 1, bits),
        codebook(1, 37, bits),
        codebook(5, 40, bits, sparse=0.1),
        codebook(67, 331, bits, sparse=0.02),
        affine(1, 32, bits, 32),
        affine(3, 128, bits, 128),
        affine(66, 384, bits, 64, sparse=0.02),
        affine(7, 96, bits, -1),
        affine(9, 96, bits, 48),
        affine(6, 80, bits, 16, sparse=0.1),
        affine(5, 70, bits, 7),
        affine(4, 256, bits, 32, zeros=False),
        affine(17, 48, bits, 16),
        affine(35, 160, bits, 32, zeros=False),
        grouped_codebook(5, 96, bits, 48),
        grouped_codebook(9, 128, bits, 32),
    ]


def _check(case: Case, x: Tensor, bias: Tensor | None = None) -> None:
    y = kernels.linear(x, case.weight, bias)
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], case.weight.n)
    expected = x.double() @ case.matrix.t()
    if bias is not None:
        expected = expected + bias.double()
    # Every output by itself: the bound is a share of the sum of its products' magnitudes.
    magnitude = x.double().abs() @ case.matrix.abs().t() + (0 if bias is None else bias.double().abs())
    worst = ((y.double() - expected).abs() / magnitude.clamp(min=1e-12)).max() if y.numel() else torch.tensor(0.0)
    assert worst < 1.01 * ROUNDING[x.dtype], f"{case.name} {list(x.shape)} {x.dtype}: {float(worst):.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", kernels.BITS)
def test_every_format_and_odd_shape(isa: str, bits: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    for case in _odd(bits):
        for m in ROWS:
            x = torch.randn(m, case.weight.k, generator=g).to(dtype)
            _check(case, x)
        _check(case, x[:2].view(1, 2, -1), torch.randn(case.weight.n, generator=g).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_by_table(isa: str, kind: torch.dtype, dtype: torch.dtype) -> None:
    for case in (fp8(35, 256, kind, 128), fp8(16, 96, kind, 96)):
        for m in ROWS:
            _check(case, torch.randn(m, case.weight.k, generator=torch.Generator().manual_seed(m)).to(dtype))


def _eight_bit_tables() -> dict[str, Tensor]:
    """Tables [256] that instruction sets compute, and some that differ from these in one entry."""
    code = torch.arange(256, dtype=torch.uint8)
    floats = code.view(torch.float8_e4m3fn).float()
    floats[[127, 255]] = torch.tensor([480.0, -480.0])  # NaN
    zeros = floats.clone()
    zeros[[127, 255]] = 0.0
    signed = code.view(torch.int8).float()
    odd = signed.clone()
    odd[200] = 3.5
    shifted = {f"from {first}": code.float() + first for first in (0, -128, -131, 1)}
    halves = code.float() - 127.5
    return {"e4m3": floats, "e4m3, NaN as 0": zeros, "int8": signed, "int8 but one": odd, "halves": halves, **shifted}


@pytest.mark.parametrize("rows", [1, 8, 256])
@pytest.mark.parametrize("name", _eight_bit_tables())
def test_every_code_of_eight_bits_is_its_entry(isa: str, name: str, rows: int) -> None:
    """Rows of the identity give W back, bit by bit: from registers and through memory, with scales and without."""
    table = _eight_bit_tables()[name]
    codes = torch.arange(256, dtype=torch.uint8).repeat(19, 1)
    for scales, zeros in ((None, None), (torch.tensor([[0.5], [-4.0]]), torch.tensor([[2.0], [-64.0]]))):
        repeat = [None if t is None else t.repeat(10, 1)[:19] for t in (scales, zeros)]
        weight = kernels.pack(codes, table[None], bits=8, scales=repeat[0], zeros=repeat[1])
        expected = table.double().expand(19, -1)
        if repeat[0] is not None and repeat[1] is not None:
            expected = (expected - repeat[1].double()) * repeat[0].double()
        y = torch.cat([kernels.linear(x, weight) for x in torch.eye(256).split(rows)])
        assert torch.equal(y.double(), expected.t())


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bits_as_files_have_them(isa: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(12)
    values = torch.randn(35, 256, generator=g).to(torch.float8_e4m3fn)
    scales = torch.rand(35, 2, generator=g) + 0.5
    signed = torch.randint(-128, 128, (35, 256), dtype=torch.int8, generator=g)
    table = torch.arange(256, dtype=torch.uint8).view(torch.int8).float()[None]
    for weight, matrix in (
        (kernels.from_fp8(values, scales[:1], (64, 128)), values.double() * scales[:1].repeat_interleave(128, 1)),
        (
            kernels.pack(signed.view(torch.uint8), table, bits=8, scales=scales, group_size=128),
            signed.double() * scales.double().repeat_interleave(128, 1),
        ),
    ):
        for m in ROWS:
            _check(Case("8 bits", weight, matrix), torch.randn(m, 256, generator=g).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_a_global_codebook_with_block_scales(isa: str, block: int, dtype: torch.dtype) -> None:
    case = nf4(70, 384, block)
    for m in ROWS:
        _check(case, torch.randn(m, 384, generator=torch.Generator().manual_seed(m)).to(dtype))


@pytest.mark.parametrize("m", [1, 2, 5, 16, 70])
@pytest.mark.parametrize(
    "case",
    [
        codebook(512, 2560, 4),
        codebook(512, 2560, 3, sparse=0.0045),
        codebook(512, 2560, 2),
        codebook(512, 2560, 8),
        affine(512, 2560, 4, 128),
        affine(512, 2560, 3, 128),
        affine(512, 2560, 8, 32),
        affine(512, 2560, 4, 16),
        affine(512, 2560, 4, 32, zeros=False),
        grouped_codebook(512, 2560, 4, 64),
        fp8(512, 2560, torch.float8_e4m3fn, 128),
        fp8(512, 2560, torch.float8_e5m2, 2560),
        nf4(512, 2560, 64),
    ],
    ids=lambda case: case.name,
)
def test_the_error_is_that_of_a_bfloat16_linear(isa: str, case: Case, m: int) -> None:
    x = torch.randn(m, 2560, generator=torch.Generator().manual_seed(5)).bfloat16()
    expected = x.double() @ case.matrix.t()
    plain = relative_error(torch.nn.functional.linear(x, case.matrix.bfloat16()), expected)
    assert relative_error(kernels.linear(x, case.weight), expected) <= 1.05 * plain


def test_thousands_of_rows_and_depths_beyond_one_tile(isa: str) -> None:
    case = codebook(40, 4160, 4)
    x = torch.randn(1500, 4160, generator=torch.Generator().manual_seed(6))
    y = kernels.linear(x, case.weight)
    assert relative_error(y, x.double() @ case.matrix.t()) < 1e-5


def test_two_threads_give_the_result_of_one(isa: str) -> None:
    case = affine(333, 512, 4, 128)
    threads = torch.get_num_threads()
    try:
        for m in (1, 9, 64):
            x = torch.randn(m, 512, generator=torch.Generator().manual_seed(7)).bfloat16()
            torch.set_num_threads(1)
            one = kernels.linear(x, case.weight)
            torch.set_num_threads(2)
            assert torch.equal(kernels.linear(x, case.weight), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [8, 32, 48, 64, 128])
@pytest.mark.parametrize("n", [1024, 4096])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.skipif(not kernels.status().native, reason="the operators are not compiled here")
def test_many_threads_have_work_and_about_the_same(isa: str, columns: bool, n: int, threads: int) -> None:
    """From four rows on there is work for all: no thread reads more than 1.5 times its share of the codes."""
    for bits, m in ((4, 4), (4, 17), (3, 64), (4, 100), (8, 128), (4, 512), (2, 1024)):
        tasks, *read = torch.ops.quantserve_kernels.shares(bits, n, 4096, 128, m, threads, columns)
        assert tasks >= threads
        assert max(read) <= 1.5 * sum(read) / threads, f"{bits} bits, batch {m}: {read}"


@pytest.mark.parametrize("m", [1, 2, 5, 20, 40])
@pytest.mark.parametrize(
    "case",
    [codebook(37, 4096, 4, sparse=0.02), affine(37, 4096, 4, 128), affine(37, 4096, 8, -1), affine(20, 3104, 3, 97)],
    ids=lambda case: case.name,
)
def test_slices_of_the_input_features_give_the_result_of_one_thread(isa: str, case: Case, m: int) -> None:
    """So few channels that nine threads divide the input features too."""
    threads = torch.get_num_threads()
    x = torch.randn(m, case.weight.k, generator=torch.Generator().manual_seed(m)).bfloat16()
    bias = torch.randn(case.weight.n, generator=torch.Generator().manual_seed(1)).bfloat16()
    try:
        torch.set_num_threads(1)
        one = kernels.linear(x, case.weight, bias)
        torch.set_num_threads(9)
        assert torch.equal(kernels.linear(x, case.weight, bias), one)
    finally:
        torch.set_num_threads(threads)
    _check(case, x, bias)


@pytest.mark.parametrize("m", [64, 130, 700])
def test_tasks_cut_along_rows_and_channels_give_the_result_of_whole_strips(isa: str, m: int) -> None:
    """Nine threads divide rows and narrow strips; every number of rows and channels has a rest somewhere."""
    threads = torch.get_num_threads()
    case = codebook(203, 160, 3, sparse=0.05)
    x = torch.randn(m, 160, generator=torch.Generator().manual_seed(m)).bfloat16()
    try:
        torch.set_num_threads(1)
        one = kernels.linear(x, case.weight)
        torch.set_num_threads(9)
        assert torch.equal(kernels.linear(x, case.weight), one)
    finally:
        torch.set_num_threads(threads)
    _check(case, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities_give_the_same_answer_at_every_batch_size(isa: str, dtype: torch.dtype) -> None:
    for case in (affine(20, 256, 4, 64), affine(9, 96, 8, 48), codebook(20, 256, 4, sparse=0.5), nf4(12, 128, 64)):
        row = torch.randn(case.weight.k, generator=torch.Generator().manual_seed(1)).to(dtype)
        for values in ([float("inf")], [float("-inf")], [float("inf"), float("inf")], [float("nan")]):
            x = row.clone()
            x[3 : 3 + len(values)] = torch.tensor(values)
            answers = [kernels.linear(x.expand(m, -1), case.weight)[0] for m in (1, 2, 3, 4, 5, 17, 70)]
            assert not torch.isfinite(answers[0]).any()
            assert torch.isinf(answers[0]).any() == (not math.isnan(values[0]))
            for answer in answers[1:]:
                assert torch.equal(answer.nan_to_num(7, 8, 9), answers[0].nan_to_num(7, 8, 9)), case.name


def test_values_that_are_not_finite_stay_in_their_rows_and_channels(isa: str) -> None:
    case = codebook(6, 64, 4)
    for m in (1, 2, 5):
        x = torch.ones(m, 64)
        x[-1, 3] = float("inf")
        y = kernels.linear(x, case.weight)
        assert torch.isfinite(y[:-1]).all()
        assert not torch.isfinite(y[-1]).any()


def test_strided_and_broadcast_inputs_are_taken_as_they_are() -> None:
    case = codebook(12, 64, 4)
    wide = torch.randn(5, 130, generator=torch.Generator().manual_seed(8))
    _check(case, wide[:, 1:65])
    _check(case, wide[:, ::2][:, :64])
    _check(case, wide[0, :64].expand(3, 64))


@pytest.mark.parametrize("bits", kernels.BITS)
@pytest.mark.parametrize("group", [-1, 16, 32, 48, 7])
@pytest.mark.parametrize("columns", [False, True])
def test_the_compiled_packer_and_the_plain_one_agree(bits: int, group: int, columns: bool) -> None:
    k = 336
    codes = torch.randint(0, 2**bits, (37, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))
    if k % max(group, 1):
        codes = codes[:, : k // group * group].contiguous()
    packed = torch.ops.quantserve_kernels.pack_codes(codes, bits, group, columns)
    assert torch.equal(packed, _fallback.pack_codes(codes, bits, group, columns))
    assert torch.equal(_fallback.unpack_codes(packed, bits, *codes.shape, group, columns), codes)
    if bits == 3 and group == -1 and not columns:
        assert packed.numel() == 40 * 512 * 3 // 8  # three bits per stored weight, not four


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [16, 32])
def test_small_groups_are_stored_without_padding(bits: int, group: int) -> None:
    weight = affine(32, 192, bits, group).weight
    assert weight.codes.numel() == 32 * 192 * bits // 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plain_torch_operator_agrees(dtype: torch.dtype) -> None:
    for case in (
        codebook(600, 331, 3, sparse=0.02),
        affine(66, 384, 4, 48, sparse=0.02),
        nf4(20, 128, 64),
        affine(530, 80, 8, 16),
        grouped_codebook(9, 96, 4, 48),
    ):
        w = case.weight
        x = torch.randn(3, w.k, generator=torch.Generator().manual_seed(10)).to(dtype)
        bias = torch.randn(w.n, generator=torch.Generator().manual_seed(11)).to(dtype)
        y = _fallback.codebook_linear(x, *tensors_of(w), bias, *numbers_of(w))
        expected = x.double() @ case.matrix.t() + bias.double()
        assert relative_error(y, expected) < ROUNDING[dtype]
        assert relative_error(w.dequantize(torch.float64), case.matrix) < 1e-6


def test_it_is_one_node_under_compile_and_shapes_may_change() -> None:
    case = affine(24, 64, 4, 32)
    layer = kernels.Linear(case.weight)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (1, 2, 5, 40):
        x = torch.randn(m, 64, generator=torch.Generator().manual_seed(m))
        assert torch.equal(compiled(x), layer(x))
    checks = torch.library.opcheck(
        torch.ops.quantserve_kernels.codebook_linear,
        (torch.randn(3, 64), *tensors_of(case.weight), None, *numbers_of(case.weight)),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("declared", [LINEAR, EXPERTS])
def test_python_declares_the_operators_as_the_compiled_library_does(declared: str) -> None:
    """Where nothing is compiled, the declaration of Python is the one there is."""
    name = declared.partition("(")[0]
    schema = getattr(torch.ops.quantserve_kernels, name).default._schema
    assert str(schema) == f"quantserve_kernels::{declared}"
