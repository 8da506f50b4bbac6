"""The CUDA kernels for codebooks: compiled for a CPU and run by its threads, and run on a GPU where there is one."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kernel_cases import csr_of  # noqa: E402
from quantserve_kernels import _cuda, _nvrtc, linear, pack  # noqa: E402

HERE = Path(__file__).parent
SOURCE = Path(_cuda.__file__).with_name("codebook.cu")
# Shapes for a CPU: fewer warps, and all that the loops have to get right.
FEW_WARPS = (
    _cuda.Kernel(8, 3, 1),
    _cuda.Kernel(16, 2, 2),
    _cuda.Kernel(64, 2, 2, stages=2, per_sm=3),
)
EPSILON = {torch.float32: 2**-23, torch.float16: 2**-11, torch.bfloat16: 2**-8}
TOKENS = (1, 7, 9, 17, 40, 64, 70)


class Cpu:
    """Starts the kernels of a shared library."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.started: list[str] = []

    def launch(self, name: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Any]) -> None:
        self.started.append(name)
        given = [
            ctypes.c_int(value)
            if isinstance(value, int)
            else ctypes.c_void_p(None if value is None else value.data_ptr())
            for value in arguments
        ]
        getattr(self.library, f"run_{name}")((ctypes.c_int * 3)(*grid), threads, *given)


@pytest.fixture(autouse=True)
def few_warps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the kernels have the shapes above."""
    if request.node.get_closest_marker("gpu"):
        return
    monkeypatch.setattr(_cuda, "NARROW", FEW_WARPS)
    monkeypatch.setattr(_cuda, "WIDE", FEW_WARPS)
    monkeypatch.setattr(_cuda, "MOST_TOKENS", FEW_WARPS[-1].tokens)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, torch.dtype], Cpu]:
    """The kernels for a number of bits and a type of x, compiled once each."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine")
    folder, made = tmp_path_factory.mktemp("cuda"), {}

    def get(bits: int, dtype: torch.dtype) -> Cpu:
        half = int(dtype == torch.float16)
        if (bits, half) not in made:
            library = folder / f"codebook-{bits}-{half}.so"
            run = " ".join(f"RUN_{'MANY' if kernel.stages else 'FEW'}({kernel.name})" for kernel in FEW_WARPS)
            given = {**_cuda.defines(bits, dtype == torch.float16), "CODEBOOK": f'"{SOURCE}"', "RUN": run}
            defines = [f"-D{key}={value}" for key, value in given.items()]
            flags = ["-std=c++20", "-O1", "-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-pthread", "-w"]
            line = [compiler, *flags, "-shared", "-fPIC", *defines, str(HERE / "cuda_on_cpu.cpp"), "-o", str(library)]
            done = subprocess.run(line, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            made[bits, half] = Cpu(library)
        return made[bits, half]

    return get


def error(
    bits: int, dtype: torch.dtype, m: int, n: int, k: int, rows: int, added: bool, device: str, launcher: Any = None
) -> str | None:
    """Compare with W decoded one by one in float64; say what is wrong."""
    generator = torch.Generator().manual_seed(bits * 1000 + m)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    table = torch.randn(rows, 2**bits, generator=generator)
    x = torch.randn(m, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator) if added else None
    weight = torch.stack([table[row % rows].double()[codes[row].long()] for row in range(n)])
    sparse = None
    if added:  # rows of no, some and all entries
        dense = torch.randn(n, k, generator=generator)
        dense *= torch.rand(n, k, generator=generator) < torch.tensor([0.1, 0.0, 1.0, 0.01])[torch.arange(n) % 4, None]
        weight += dense
        sparse = csr_of(dense)
    words = _cuda.pack_codes(codes.to(device), bits)
    on = [None if given is None else given.to(device) for given in (x, table, bias)]
    y = _cuda.linear(
        on[0],
        words,
        on[1],
        None if sparse is None else tuple(part.to(device) for part in sparse),
        on[2],
        bits,
        n,
        launcher,
    )
    assert (y.dtype, tuple(y.shape)) == (dtype, (m, n))
    expected, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if bias is not None:
        expected, size = expected + bias, size + bias.abs()
    # W rounded to x's dtype, twice where it meets S, the sum rounded to it (twice with a bias), float32 sums.
    allowed = EPSILON[dtype] * (2.02 * size + 2 * expected.abs()) + 1e-6 * size
    wrong = ~((y.cpu().double() - expected).abs() <= allowed)
    if wrong.any():
        token, channel = wrong.nonzero()[0].tolist()
        return f"{int(wrong.sum())} wrong, y[{token}, {channel}] = {y[token, channel]}, not {expected[token, channel]}"
    return None


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", _cuda.BITS)
def test_agrees_with_float64_on_a_cpu(
    bits: int, dtype: torch.dtype, m: int, compiled: Callable[[int, torch.dtype], Cpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cuda, "STRIP", 48 * 200)  # several strips
    # Ends inside a tile of channels and of features, more tiles of k than warps, a lone channel, one codebook for all.
    for n, k, rows, added in ((77, 200, 77, False), (1, 64, 1, True), (33, 328, 1, True)):
        assert error(bits, dtype, m, n, k, rows, added, "cpu", compiled(bits, dtype)) is None


@pytest.mark.parametrize("bits", _cuda.BITS)
def test_float32_is_decoded_and_multiplied_in_float32(bits: int, compiled: Callable[[int, torch.dtype], Cpu]) -> None:
    kernels = compiled(bits, torch.float32)
    kernels.started.clear()
    assert error(bits, torch.float32, 3, 50, 136, 50, True, "cpu", kernels) is None
    assert kernels.started == ["dequantize_float32", "add_sparse_float32"]


def test_tokens_choose_the_kernel_and_few_channels_are_split_along_k(
    compiled: Callable[[int, torch.dtype], Cpu],
) -> None:
    kernels = compiled(4, torch.bfloat16)
    kernels.started.clear()
    for m in (0, 1, 8, 9, 16, 17, 64, 65):
        assert error(4, torch.bfloat16, m, 16, 200, 16, False, "cpu", kernels) is None
    split = ["many64_2_2", "add_parts"]
    assert kernels.started == [*["few8_3_1"] * 2, *["few16_2_2"] * 2, *split, *split, "dequantize"]


@pytest.mark.parametrize("bits", _cuda.BITS)
def test_codes_lie_where_the_layout_says(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (40, 136), dtype=torch.uint8)
    packed = _cuda.pack_codes(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, 3, 32 * bits)
    for channel, feature in [(0, 0), (9, 63), (7, 33), (39, 135), (16, 64), (31, 100), (8, 8), (23, 1)]:
        words = packed[channel // 16, feature // 64].tolist()
        lane = channel % 8 * 4 + feature % 32 // 8
        octet, place = channel % 16 // 8 * 2 + feature % 64 // 32, feature % 8
        if bits == 4:
            code = words[lane * 4 + octet] >> 4 * place & 15
        elif bits == 2:
            code = words[lane * 2 + octet // 2] >> 4 * place + 2 * (octet % 2) & 3
        elif octet < 3:
            code = words[octet * 32 + lane] >> 4 * place & 7
        else:
            code = sum((words[j * 32 + lane] >> 4 * place + 3 & 1) << j for j in range(3))
        assert code == codes[channel, feature]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", _cuda.BITS)
def test_agrees_with_float64_on_a_gpu(bits: int, dtype: torch.dtype) -> None:
    for m in (0, 8, 128, 300, *TOKENS):
        for n, k, rows, added in ((77, 200, 77, False), (1, 64, 1, True), (33, 328, 1, True), (9000, 512, 9000, True)):
            assert error(bits, dtype, m, n, k, rows, added, "cuda") is None


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_gpu_result_is_the_same_when_captured_and_replayed(m: int) -> None:
    n, k = 512, 4096
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    words, table = _cuda.pack_codes(codes, 4), torch.randn(n, 16, device="cuda")
    x = torch.randn(m, k, dtype=torch.float16, device="cuda")
    _cuda.linear(x, words, table, None, None, 4, n)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = _cuda.linear(x, words, table, None, None, 4, n)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, _cuda.linear(x, words, table, None, None, 4, n))


@pytest.mark.gpu
def test_gpu_kernels_are_loaded_before_a_capture_meets_them() -> None:
    """Other numbers of tokens than before run other kernels; in a process of its own, where none has run."""
    code = """
import torch
from quantserve_kernels import _cuda
codes = torch.randint(0, 16, (512, 4096), dtype=torch.uint8, device="cuda")
words, table = _cuda.pack_codes(codes, 4), torch.randn(512, 16, device="cuda")
x = torch.randn(64, 4096, dtype=torch.bfloat16, device="cuda")
_cuda.linear(x[:1], words, table, None, None, 4, 512)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    ys = [_cuda.linear(x[:m], words, table, None, None, 4, 512) for m in (9, 17, 64)]
graph.replay()
torch.cuda.synchronize()
assert all(torch.equal(y, _cuda.linear(x[:len(y)], words, table, None, None, 4, 512)) for y in ys)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.gpu
def test_gpu_weights_go_the_way_that_suits_them() -> None:
    """A weight per channel is a codebook, with zero points too; groups are Triton's. Both give W."""
    codes = torch.randint(0, 16, (96, 256), dtype=torch.uint8, device="cuda")
    table = torch.arange(16.0, device="cuda")[None]
    x = torch.randn(5, 256, dtype=torch.bfloat16, device="cuda")
    for group in (-1, 64):
        groups = 1 if group == -1 else 256 // group
        scales = (torch.rand(96, groups, device="cuda") + 0.5).half()
        zeros = torch.randint(0, 16, scales.shape, device="cuda").half()
        weight = pack(codes, table, bits=4, scales=scales, zeros=zeros, group_size=group)
        assert weight.codes.ndim == (3 if group == -1 else 2)
        wide = [part.double().repeat_interleave(256 // groups, 1) for part in (zeros, scales)]
        expected = x.double() @ ((codes.double() - wide[0]) * wide[1]).T
        assert ((linear(x, weight).double() - expected).norm() / expected.norm()) < 4e-3


def test_a_source_that_does_not_compile_says_where() -> None:
    if not torch.version.cuda:
        pytest.skip("torch without CUDA brings no NVRTC")
    with pytest.raises(_nvrtc.CudaError, match=r"broken\.cu\(1\)"):
        _nvrtc.compile_source("nonsense", "broken.cu", "sm_90", {})
