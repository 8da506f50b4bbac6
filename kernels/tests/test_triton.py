"""The GPU kernels: run by Triton's interpreter, compiled for sm_90, and, where there is a GPU, run on it.

The interpreter is chosen when Triton is imported, so those cases run in a subprocess: this file as a script.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
torch = pytest.importorskip("torch")

from quantserve_kernels import _triton  # noqa: E402

BITS = (2, 3, 4, 8)
DTYPES = ("float32", "float16", "bfloat16")
NF4 = (-1.0, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0)
# What interpreter and hardware may be off by, relative to sum |x w|. The interpreter cuts bfloat16 instead of rounding.
EPSILON = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}


@dataclass(frozen=True)
class Case:
    """One call of `linear`; table "rows" is a codebook a row, "integers" 0, 1, 2 and on, "values" a global codebook."""

    bits: int
    table: str
    scaled: bool
    zeros: bool
    n: int
    k: int
    group: int
    dtype: str
    m: int


def cases(bits: int) -> list[Case]:
    """Every format, type and number of tokens, on shapes that end inside a chunk, a row tile and a group."""
    formats = [
        ("rows", False, False, 3, 77, -1),
        ("rows", True, False, 2, 1, -1),
        ("integers", True, True, 5, 96, 32),
        ("integers", True, True, 1, 64, 64),
        ("integers", True, True, 3, 384, 128),
        ("integers", True, True, 2, 33, -1),
        ("integers", False, True, 2, 576, 96),  # groups that straddle chunks
        ("integers", True, True, 1, 33, 11),  # groups that straddle words
        ("values", True, False, 3, 192, 64),
    ]
    found = [Case(bits, *form, dtype, m) for form in formats for dtype in DTYPES for m in (1, 3, 17)]
    found += [Case(bits, "rows", False, False, 3, 40, -1, dtype, 0) for dtype in DTYPES]
    # Long rows: several turns of the loop over k, several warps, k split over programs.
    return found + [Case(bits, "rows", False, False, 1, 5000, -1, "float32", m) for m in (1, 5)]


def inputs(case: Case) -> dict[str, Any]:
    """Return codes and the tensors of a case, seeded by the case."""
    generator = torch.Generator().manual_seed(hash((case.bits, case.n, case.k, case.group, case.m)) % 2**31)
    entries = 2**case.bits
    groups = case.k // (case.group if case.group > 0 else case.k)
    parameters = [torch.float16, torch.bfloat16, torch.float32][(case.m + case.bits) % 3]
    tables = {
        "rows": torch.randn(case.n, entries, generator=generator),
        "integers": torch.arange(entries, dtype=torch.float32)[None],
        "values": torch.tensor([NF4[code % 16] * (1 + code // 16) for code in range(entries)])[None],
    }
    scales = torch.rand(case.n, groups, generator=generator) * 0.1 + 0.01
    zeros = torch.rand(case.n, groups, generator=generator) * (entries - 1)
    return {
        "x": torch.randn(case.m, case.k, generator=generator).to(getattr(torch, case.dtype)),
        "codes": torch.randint(0, entries, (case.n, case.k), generator=generator, dtype=torch.uint8),
        "table": tables[case.table].contiguous(),
        "scales": scales.to(parameters) if case.scaled else None,
        "zeros": zeros.to(parameters) if case.zeros else None,
    }


def call(case: Case, given: dict[str, Any], device: str) -> Any:
    """Return `linear` on the device."""
    words = _triton.pack_codes(given["codes"].to(device), case.bits)
    x, table, scales, zeros = (
        None if given[name] is None else given[name].to(device) for name in ("x", "table", "scales", "zeros")
    )
    return _triton.linear(x, words, table, scales, zeros, case.bits, case.n, case.k, case.group)


def failure(case: Case, device: str) -> str | None:
    """Run a case and say what is wrong with its result, judged in float64 against W decoded one by one."""
    given = inputs(case)
    y = call(case, given, device)
    if y.shape != (case.m, case.n) or y.dtype != given["x"].dtype:
        return f"{case}: {y.dtype} {tuple(y.shape)}"
    weight = torch.empty(case.n, case.k, dtype=torch.float64)
    group = case.group if case.group > 0 else case.k
    for row in range(case.n):
        book = given["table"][row if len(given["table"]) > 1 else 0].tolist()
        scale = [1.0] if given["scales"] is None else given["scales"][row].tolist()
        zero = [0.0] if given["zeros"] is None else given["zeros"][row].tolist()
        for at, code in enumerate(given["codes"][row].tolist()):
            g = at // group
            weight[row, at] = (book[code] - zero[g if len(zero) > 1 else 0]) * scale[g if len(scale) > 1 else 0]
    x = given["x"].double()
    expected, size = x @ weight.T, x.abs() @ weight.abs().T
    rounded = case.dtype if case.m > _triton.GEMV_TOKENS[-1] else "float32"  # what W was decoded to
    allowed = EPSILON[case.dtype] * expected.abs() + (EPSILON[rounded] + 1e-6) * size
    wrong = ~((y.cpu().double() - expected).abs() <= allowed)
    if wrong.any():
        token, row = wrong.nonzero()[0].tolist()
        return f"{case}: {int(wrong.sum())} wrong, y[{token}, {row}] = {y[token, row]}, not {expected[token, row]}"
    return None


def sparse_failure(m: int, dtype: str, device: str) -> str | None:
    """Compare `sparse_linear` on empty, short and long rows with float64."""
    generator = torch.Generator().manual_seed(m)
    n, k = 5, 300
    dense = torch.randn(n, k, generator=generator)
    dense *= torch.rand(n, k, generator=generator) < torch.tensor([0.0, 0.01, 0.1, 1.0, 0.0])[:, None]
    x = torch.randn(m, k, generator=generator).to(getattr(torch, dtype))
    found = dense.nonzero()
    rows = torch.tensor([int((found[:, 0] < row).sum()) for row in range(n + 1)], dtype=torch.int32)
    cols, vals = found[:, 1].to(torch.int32), dense[found[:, 0], found[:, 1]]
    y = _triton.sparse_linear(*(given.to(device) for given in (x, rows, cols, vals)))
    expected, size = x.double() @ dense.double().T, x.double().abs() @ dense.double().abs().T
    good = y.dtype == torch.float32 and ((y.cpu().double() - expected).abs() <= 1e-6 * size).all()
    return None if good else f"sparse, {m} tokens of {dtype}: {y} is not {expected}"


def failures(bits: int, device: str) -> list[str]:
    """Run all cases of a bit width and return what failed."""
    texts = [failure(case, device) for case in cases(bits)]
    texts += [sparse_failure(m, dtype, device) for m in (0, 1, 3, 17) for dtype in DTYPES]
    return [text for text in texts if text is not None]


def interpret(bits: int) -> None:
    """Run all cases of a bit width in the interpreter, print failures and how many cases ran."""
    from triton.runtime import interpreter  # type: ignore[import-untyped]

    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """Triton 3.9's interpreter keeps bfloat16 as its 16 bits and multiplies those as integers: widen them."""
        if a.dtype == triton.language.bfloat16:
            a, b = (
                interpreter.TensorHandle((side.data.astype("uint32") << 16).view("float32"), triton.language.float32)
                for side in (a, b)
            )
        return multiply(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot
    print(*failures(bits, "cpu"), f"ran {len(cases(bits))}", sep="\n")


@pytest.mark.parametrize("bits", BITS)
def test_interpreter_agrees_with_float64(bits: int) -> None:
    package = str(Path(_triton.__file__).parents[1])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": package}
    asked = subprocess.run(
        [sys.executable, __file__, str(bits)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip().splitlines() == [f"ran {len(cases(bits))}"]


@pytest.mark.parametrize("bits", BITS)
def test_codes_take_their_bits_and_lie_where_the_layout_says(bits: int) -> None:
    span = _triton.span(bits)
    codes = torch.randint(0, 2**bits, (3, span * 3), dtype=torch.uint8)
    packed = _triton.pack_codes(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, 96 if bits != 3 else 96 + 64)  # three chunks, and third bits of two chunks a word
    for row, at in [(0, 0), (0, 32), (1, 1), (2, span * 2 - 1), (2, span), (1, span - 33), (0, span * 3 - 1)]:
        chunk, field, word = at // span, at % span // 32, at % 32
        width = 2 if bits == 3 else bits
        code = int(packed[row, chunk * 32 + word]) >> width * field & (1 << width) - 1
        if bits == 3:
            code += 4 * (int(packed[row, 96 + chunk // 2 * 32 + word]) >> 16 * (chunk % 2) + field & 1)
        assert code == codes[row, at]


FLOATS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> Any:
    """Compile a kernel for an H100; needs no GPU. What is not named is an integer; pointers, n and k divide by 16."""
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
    from triton.compiler import ASTSource  # type: ignore[import-untyped]

    names = kernel.arg_names
    options = {"num_warps": constants.get("num_warps", 4), "enable_fp_fusion": True}
    constants = {name: value for name, value in constants.items() if name in names}
    sixteenths = [name for name in names if name not in constants and (name in types or name in ("n", "k"))]
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in sixteenths},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
def test_compiles_for_an_h100_with_wide_loads_and_next_to_no_spills(bits: int, tmp_path: Path) -> None:
    """The kernels as `linear` launches them on a layer [4096, 4096]; types and formats take turns."""
    chunks = 4096 // _triton.span(bits)
    formats = [(dtype, group) for group in (None, 128) for dtype in DTYPES]
    for turn, m in enumerate((*_triton.GEMV_TOKENS, 16, 32, 64, 128, 512)):
        dtype, group = formats[(turn + bits) % len(formats)]
        types = {"x_ptr": FLOATS[dtype], "y_ptr": FLOATS[dtype], "words_ptr": "*i32", "table_ptr": "*fp32"}
        constants: dict[str, Any] = {"BITS": bits, "SPAN": _triton.span(bits), "ALIGNED": True}
        constants["GROUP"] = group or _triton.ONE_GROUP
        for name in ("scales_ptr", "zeros_ptr"):
            if group is None:
                constants[name] = None
            else:
                types[name] = "*fp16"
        if m in _triton.GEMV_TOKENS:
            kernel, shape = _triton._gemv, _triton.gemv_shape(m, chunks)
        else:
            kernel, (shape, _) = _triton._tile, _triton.tile_shape(m, 4096, chunks, getattr(torch, dtype))
        binary = compiled(kernel, types, constants | shape)
        which = f"{kernel.__name__} m={m} {dtype} group={group}"
        loads = re.findall(r"ld\.global\S*evict_first\S*", binary.asm["ptx"])
        assert loads, which
        assert all(".v4." in load for load in loads), f"{which}: {set(loads)}"
        if kernel is _triton._tile and dtype != "float32":
            assert re.search(r"wgmma|mma\.sync", binary.asm["ptx"]), which
        assert spilled(binary.asm["cubin"], tmp_path) <= 128, which  # bytes; a badly shaped tile spills ten times that


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_kernels_compile_for_an_h100(dtype: str) -> None:
    sparse = {"x_ptr": FLOATS[dtype], "rows_ptr": "*i32", "cols_ptr": "*i32", "vals_ptr": "*fp32", "y_ptr": "*fp32"}
    assert compiled(_triton._sparse, sparse, {"TOKENS": 16, "BLOCK": 64}).asm["cubin"]
    parts = {"parts_ptr": "*fp32", "y_ptr": FLOATS[dtype]}
    assert compiled(_triton._add_splits, parts, {"BLOCK": 1024}).asm["cubin"]


def spilled(cubin: bytes, folder: Path) -> int:
    """Return the bytes of stack a kernel takes; 0 where Triton came without NVIDIA's tools."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return 0
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    shown = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return max(int(stack) for stack in re.findall(r"STACK:(\d+)", shown))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
def test_gpu_agrees_with_float64(bits: int) -> None:
    assert failures(bits, "cuda") == []


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 4, 16, 300])
def test_gpu_result_is_the_same_when_captured_and_replayed(m: int) -> None:
    n, k = 512, 4096
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    words, table = _triton.pack_codes(codes, 4), torch.randn(n, 16, device="cuda")
    x = torch.randn(m, k, dtype=torch.float16, device="cuda")
    _triton.linear(x, words, table, None, None, 4, n, k, -1)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = _triton.linear(x, words, table, None, None, 4, n, k, -1)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, _triton.linear(x, words, table, None, None, 4, n, k, -1))


if __name__ == "__main__":
    interpret(int(sys.argv[1]))
