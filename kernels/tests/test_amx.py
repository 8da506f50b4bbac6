"""The AMX kernel against float64: with emulated tile registers everywhere, with real ones where there is AMX."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import quantserve_kernels as kernels
from kernel_cases import Case, affine, codebook, nf4, relative_error
from quantserve_kernels import _fallback, _ops, _status

HERE = Path(__file__).parent
FEATURES = (
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "fma",
    "f16c",
    "avx512bf16",
    "avx512vbmi",
    "amx-tile",
    "amx-bf16",
)
WARNINGS = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")
FLAGS = ("-std=c++20", "-O1", "-shared", "-fPIC", *WARNINGS, *(f"-m{name}" for name in FEATURES))
pytestmark = pytest.mark.slow  # compiles for half a minute
HAS_BF16 = "avx512bf16" in _ops.instruction_sets()
HAS_AMX = "amx" in _ops.instruction_sets()
FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# In bfloat16 the weight, its sparse addition and the result are each rounded by 2^-8.
ROUNDING = {torch.float32: 2 * 2**-8, torch.bfloat16: 3 * 2**-8}


class _Weight(ctypes.Structure):
    """`Weight` of csrc/kernel.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("bits", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("n", "k", "k_padded", "group", "group_padded", "groups")),
        ("columns", ctypes.c_bool),
        ("coding", ctypes.c_int),
        ("table", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("scale_type", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("rows", "cols", "vals")),
        ("nnz", ctypes.c_int64),
        ("stored", ctypes.c_bool),
    )


class _Source(ctypes.Structure):
    _fields_ = (("x", ctypes.c_void_p), ("type", ctypes.c_int), ("m", ctypes.c_int64))


class _Output(ctypes.Structure):
    _fields_ = (("y", ctypes.c_void_p), ("type", ctypes.c_int), ("bias", ctypes.c_void_p))


class Amx:
    """The kernel in a library of its own."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.allowed.restype = ctypes.c_bool
        self.library.tasks.restype = ctypes.c_int64

    def tasks(self, bits: int, n: int, k: int, m: int, threads: int, columns: bool) -> int:
        numbers = (ctypes.c_int64(value) for value in (n, k, m, threads))
        return self.library.tasks(bits, *numbers, ctypes.c_bool(columns))

    def linear(
        self,
        x: Tensor,
        weight: kernels.PackedWeight,
        bias: Tensor | None = None,
        *,
        threads: int = 1,
        stored: bool = False,
        configured: bool = False,
    ) -> Tensor:
        """x [m, k] times the weight; `stored` takes tiles for few rows too, `configured` begins with foreign tiles."""
        y = torch.full((x.shape[0], weight.n), float("nan"), dtype=x.dtype)
        group = weight.k if weight.group_size == -1 else weight.group_size
        made = _Weight(
            codes=weight.codes.data_ptr(),
            bits=weight.bits,
            n=weight.n,
            k=weight.k,
            group=group,
            columns=_fallback.columns_of(weight.table),
            coding=weight.bits,
            table=weight.table.data_ptr(),
            scales=_pointer(weight.scales),
            zeros=_pointer(weight.zeros),
            scale_type=0 if weight.scales is None else FLOATS[weight.scales.dtype],
            rows=_pointer(weight.rows),
            cols=_pointer(weight.cols),
            vals=_pointer(weight.vals),
            nnz=0 if weight.cols is None else weight.cols.numel(),
            stored=stored,
        )
        wide = None if bias is None else bias.float()
        source, output = _Source(x.data_ptr(), FLOATS[x.dtype], x.shape[0]), _Output(y.data_ptr(), FLOATS[x.dtype])
        output.bias = _pointer(wide)
        places = [ctypes.byref(value) for value in (made, source, output)]
        failure = self.library.linear(*places, ctypes.c_int64(threads), ctypes.c_bool(configured))
        assert failure == 0, {1: "a sparse index is out of range", 2: "tiles were not left as they were"}[failure]
        return y


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _built(folder: Path, *flags: str) -> Amx:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    library = folder / "amx.so"
    done = subprocess.run(
        [compiler, *FLAGS, *flags, str(HERE / "amx_emulated.cpp"), "-o", str(library)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return Amx(library)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Amx:
    if not HAS_BF16:
        pytest.skip("this processor lacks AVX-512-BF16, which decodes the weights of the AMX kernel")
    return _built(tmp_path_factory.mktemp("emulated"), "-DQUANTSERVE_EMULATED_TILES")


def _check(case: Case, x: Tensor, y: Tensor, bias: Tensor | None = None) -> None:
    expected = x.double() @ case.matrix.t()
    magnitude = x.double().abs() @ case.matrix.abs().t()
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    worst = float(((y.double() - expected).abs() / magnitude.clamp(min=1e-12)).max())
    assert worst < 1.01 * ROUNDING[x.dtype], f"{case.name} {list(x.shape)}: {worst:.2e}"


def _scaled(n: int, k: int, bits: int, group: int) -> Case:
    """A codebook per output channel and a scale per group: rows whose decoded weights are scaled."""
    g = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=g)
    table, scales = torch.randn(n, 2**bits, generator=g), torch.rand(n, k // group, generator=g) + 0.5
    matrix = torch.gather(table.double(), 1, codes.long()) * scales.double().repeat_interleave(group, 1)
    return Case("scaled rows", kernels.pack(codes, table, bits=bits, scales=scales, group_size=group), matrix)


def _shapes(bits: int) -> list[Case]:
    """Both layouts, scales and zeros, with one channel, tails of tiles, strips, rounds, blocks and groups."""
    return [
        codebook(1, 1, bits),
        codebook(5, 40, bits, sparse=0.1),
        codebook(67, 331, bits, sparse=0.02),
        codebook(16, 512, bits),
        codebook(300, 1100, bits, sparse=0.01),
        affine(1, 32, bits, 32),
        affine(66, 384, bits, 64, sparse=0.02),
        affine(7, 96, bits, -1),
        affine(9, 96, bits, 48),
        affine(6, 80, bits, 16, sparse=0.1),
        affine(5, 70, bits, 7),
        affine(36, 256, bits, 32, zeros=False),
        affine(130, 1152, bits, 128),
        affine(20, 540, bits, 20, sparse=0.01),
        _scaled(67, 384, bits, 64),
    ]


@pytest.mark.parametrize("bits", kernels.BITS)
def test_every_format_and_odd_shape(emulated: Amx, bits: int) -> None:
    g = torch.Generator().manual_seed(3)
    for case in _shapes(bits):
        for m in (1, 2, 5, 15, 16, 17, 33, 50):
            x = torch.randn(m, case.weight.k, generator=g).bfloat16()
            _check(case, x, emulated.linear(x, case.weight, stored=True))
            _check(case, x, emulated.linear(x, case.weight))
        bias = torch.randn(case.weight.n, generator=g).bfloat16()
        _check(case, x, emulated.linear(x, case.weight, bias), bias)
        wide = torch.randn(18, case.weight.k, generator=g)
        _check(case, wide, emulated.linear(wide, case.weight))


@pytest.mark.parametrize("m", [5, 16, 70])
@pytest.mark.parametrize(
    "case",
    [
        codebook(200, 2560, 4),
        codebook(200, 2560, 3, sparse=0.0045),
        codebook(200, 2560, 2),
        codebook(200, 2560, 8),
        affine(200, 2560, 4, 128),
        affine(200, 2560, 3, 128),
        affine(200, 2560, 8, 32),
        nf4(200, 2560, 64),
    ],
    ids=lambda case: case.name,
)
def test_the_error_is_that_of_a_bfloat16_linear(emulated: Amx, case: Case, m: int) -> None:
    x = torch.randn(m, 2560, generator=torch.Generator().manual_seed(5)).bfloat16()
    expected = x.double() @ case.matrix.t()
    plain = relative_error(torch.nn.functional.linear(x, case.matrix.bfloat16()), expected)
    assert relative_error(emulated.linear(x, case.weight), expected) <= 1.05 * plain


@pytest.mark.parametrize("m", [1, 6, 64, 130, 600])
def test_the_number_of_threads_changes_no_result(emulated: Amx, m: int) -> None:
    case = codebook(203, 160, 3, sparse=0.05)
    x = torch.randn(m, 160, generator=torch.Generator().manual_seed(m)).bfloat16()
    one = emulated.linear(x, case.weight)
    _check(case, x, one)
    for threads in (2, 9, 64):
        assert torch.equal(emulated.linear(x, case.weight, threads=threads), one)


def test_another_librarys_tiles_are_configured_again_afterwards(emulated: Amx) -> None:
    case = affine(70, 256, 4, 64)
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    for configured in (False, True):
        _check(case, x, emulated.linear(x, case.weight, threads=3, configured=configured))


def test_values_that_are_not_finite_stay_in_their_rows_and_channels(emulated: Amx) -> None:
    case = codebook(40, 96, 4)
    x = torch.ones(21, 96).bfloat16()
    x[20, 3], x[18, 95] = float("inf"), float("nan")
    y = emulated.linear(x, case.weight)
    assert torch.isfinite(y[[*range(18), 19]]).all()
    assert torch.isinf(y[20]).all()
    assert torch.isnan(y[18]).all()


def test_sparse_indices_are_checked(emulated: Amx) -> None:
    case = codebook(20, 64, 4, sparse=0.2)
    assert case.weight.cols is not None
    case.weight.cols[-1] = 1 << 20
    with pytest.raises(AssertionError, match="out of range"):
        emulated.linear(torch.ones(8, 64).bfloat16(), case.weight)


@pytest.mark.parametrize("threads", [8, 32, 64, 128])
@pytest.mark.parametrize("n", [1024, 4096])
def test_threads_get_two_tasks_each_where_there_are_so_many_tiles(emulated: Amx, n: int, threads: int) -> None:
    for bits, m in ((4, 17), (3, 64), (4, 100), (8, 128), (4, 512), (2, 1024)):
        tiles = n // 16 * -(-m // 16)
        for columns in (False, True):
            assert emulated.tasks(bits, n, 4096, m, threads, columns) >= min(2 * threads, tiles)


@pytest.mark.skipif(not kernels.status().native or shutil.which("objdump") is None, reason="no library, or no objdump")
def test_the_installed_library_has_the_instructions_and_no_emulation() -> None:
    library = str(_status.library())
    text = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"\btdpbf16ps\b", text)) == 32  # for each result of six register blocks, in both layouts
    assert re.search(r"\bldtilecfg\b", text)
    assert re.search(r"\btilerelease\b", text)


@pytest.mark.skipif(not HAS_AMX, reason=kernels.status().note or "this processor has no AMX")
@pytest.mark.parametrize("bits", kernels.BITS)
def test_the_instructions_give_the_result_of_the_emulation(emulated: Amx, tmp_path: Path, bits: int) -> None:
    real = _built(tmp_path)
    assert real.library.allowed()
    for case in _shapes(bits):
        x = torch.randn(37, case.weight.k, generator=torch.Generator().manual_seed(4)).bfloat16()
        assert torch.equal(real.linear(x, case.weight, configured=True), emulated.linear(x, case.weight)), case.name
