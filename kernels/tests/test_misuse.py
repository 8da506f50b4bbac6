"""Wrong arguments raise with the numbers, and nothing outside the tensors is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import quantserve_kernels as kernels
from kernel_cases import affine, codebook

LINEAR = ["x", "codes", "table", "scales", "zeros", "rows", "cols", "vals", "bias", "bits", "n", "k", "group_size"]


def _arguments() -> dict[str, Any]:
    w = affine(6, 64, 4, 32, sparse=0.1).weight
    return {"x": torch.randn(2, 64), "bias": None, **{name: getattr(w, name) for name in LINEAR[1:] if name != "bias"}}


def _call(arguments: dict[str, Any]) -> torch.Tensor:
    out: torch.Tensor = torch.ops.quantserve_kernels.codebook_linear(*(arguments[name] for name in LINEAR))
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 63)}, r"x has shape \[2, 63\], expected \[\.\.\., 64\]"),
        ({"x": torch.randn(2, 64).double()}, r"x is Double; known: float32, float16, bfloat16"),
        ({"x": torch.ones(2, 64, dtype=torch.int32)}, r"x is Int"),
        ({"codes": torch.zeros(7, dtype=torch.uint8)}, r"codes has shape \[7\], expected \[512\]"),
        ({"codes": torch.zeros(512, dtype=torch.int8)}, r"codes is Char, expected Byte"),
        ({"codes": torch.zeros(1024, dtype=torch.uint8)[::2]}, r"codes is not contiguous"),
        ({"table": torch.zeros(1, 8)}, r"table has shape \[1, 8\], expected \[1, 16\]"),
        ({"table": torch.zeros(5, 16)}, r"table has shape \[5, 16\]"),
        ({"table": torch.zeros(1, 16).half()}, r"table is Half, expected Float"),
        ({"table": torch.zeros(16, 6).t()}, r"table is not contiguous"),
        ({"scales": torch.zeros(6, 3).half()}, r"scales has shape \[6, 3\], expected \[1, 2, 16\]"),
        ({"scales": torch.zeros(2, 2, 4, dtype=torch.int32)}, r"scales is Int"),
        ({"scales": None}, r"zeros need scales"),
        ({"zeros": torch.zeros(2, 2, 4)}, r"zeros is Float, expected Half"),
        ({"rows": torch.zeros(6, dtype=torch.int32)}, r"rows has shape \[6\], expected \[7\]"),
        ({"cols": None}, r"rows, cols and vals come together"),
        ({"vals": torch.zeros(1)}, r"vals has shape"),
        ({"bias": torch.zeros(5)}, r"bias has shape \[5\], expected \[6\]"),
        ({"bits": 5}, r"bits is 5; known: 2, 3, 4, 8"),
        ({"group_size": 48}, r"group_size 48 does not divide k 64"),
        ({"group_size": 0}, r"group_size 0 does not divide"),
        ({"n": 0}, r"n 0 and k 64"),
        ({"n": 7}, r"rows has shape \[7\], expected \[8\]|codes has shape"),
        ({"k": 128}, r"x has shape"),
        ({"k": -64}, r"k -64"),
        ({"k": 2**40}, r"k 1099511627776"),
    ],
)
@pytest.mark.skipif(not kernels.status().native, reason="the operators are not compiled here")
def test_the_operator_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        _call({**_arguments(), **change})


@pytest.mark.parametrize("m", [1, 2, 8])
@pytest.mark.parametrize(
    "change",
    [
        lambda a: a["cols"].fill_(64 * 1000),
        lambda a: a["cols"].fill_(-1),
        lambda a: a["cols"][-1:].fill_(2**31 - 1),
        lambda a: a["rows"].fill_(2**31 - 1),
        lambda a: a["rows"].copy_(a["rows"].flip(0)),
        lambda a: a["rows"].fill_(-5),
    ],
)
@pytest.mark.skipif(not kernels.status().native, reason="the operators are not compiled here")
def test_a_broken_sparse_part_is_noticed_and_reads_nothing_outside(change: Callable[[Any], Any], m: int) -> None:
    arguments = _arguments()
    arguments["x"] = torch.randn(m, 64)
    change(arguments)
    with pytest.raises(ValueError, match="the sparse part is no CSR matrix of 6 rows"):
        _call(arguments)


def _codes(n: int = 6, k: int = 64) -> torch.Tensor:
    return torch.zeros(n, k, dtype=torch.uint8)


TABLE = torch.randn(1, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: kernels.pack(_codes() + 16, TABLE, bits=4),
            r"codes go up to 16, which does not fit 4 bits \(0\.\.15\)",
        ),
        (lambda: kernels.pack(_codes().int(), TABLE, bits=4), r"codes is torch\.int32 \[6, 64\], expected uint8"),
        (lambda: kernels.pack(_codes()[0], TABLE, bits=4), r"codes is torch\.uint8 \[64\]"),
        (lambda: kernels.pack(_codes(), TABLE, bits=3), r"table has shape \[1, 16\], expected \[6, 8\] or \[1, 8\]"),
        (lambda: kernels.pack(_codes(), TABLE, bits=6), r"bits is 6; known: 2, 3, 4, 8"),
        (lambda: kernels.pack(_codes(), TABLE * float("nan"), bits=4), r"table holds 16 values that are not finite"),
        (lambda: kernels.pack(_codes(), TABLE, bits=4, scales=torch.ones(6, 3)), r"scales has shape \[6, 3\]"),
        (lambda: kernels.pack(_codes(), TABLE, bits=4, zeros=torch.ones(6, 1)), r"zeros without scales"),
        (lambda: kernels.pack(_codes(), TABLE, bits=4, group_size=60), r"group_size 60 does not divide k 64"),
        (lambda: kernels.pack(_codes(0), TABLE, bits=4), r"\[0, 64\] has nothing to multiply"),
        (
            lambda: kernels.pack(_codes(), TABLE.to(torch.complex64), bits=4),
            r"table is torch\.complex64, expected real",
        ),
        (lambda: kernels.pack(_codes(), TABLE.to("meta"), bits=4), r"table is on meta, and there are kernels for cpu"),
        (
            lambda: kernels.pack(lambda a, b: _codes(b - a, 63), TABLE, bits=4, shape=(6, 64)),
            r"codes of channels 0 to 5 are torch\.uint8 \[6, 63\] on cpu, expected uint8 \[6, 64\]",
        ),
        # What becomes infinite when it is rounded to the dtype it is kept in, or to the one the kernels multiply in.
        (lambda: _packed(table=torch.full((1, 16), 1e300, dtype=torch.float64)), r"table holds 16 .* in float32"),
        (lambda: _packed(scales=torch.full((6, 1), 1e300, dtype=torch.float64)), r"scales holds 6 .* in float32"),
        (
            lambda: _packed(scales=torch.ones(6, 1).half(), zeros=torch.full((6, 1), 70000.0)),
            r"zeros holds 6 values that are not finite in float16",
        ),
        (lambda: _packed(table=torch.full((1, 16), 3.4e38)), r"go up to 3\.4e\+38, which bfloat16 rounds to infinity"),
        (lambda: _packed(table=torch.full((6, 16), -3.4e38)), r"go up to 3\.4e\+38"),
        (
            lambda: _packed(table=torch.full((6, 16), 2.0), scales=torch.full((6, 1), 3e38)),
            r"which bfloat16 rounds to infinity \(from 3\.3962e\+38 on\)",
        ),
        (lambda: _packed(zeros=torch.full((6, 1), 3e38), scales=torch.full((6, 1), 2.0)), r"go up to 6e\+38"),
        (lambda: _sparse([5], [3.4e38]), r"go up to 3\.4e\+38"),
        (lambda: _sparse([5], [float("inf")]), r"vals holds 1 values that are not finite in float32"),
        (lambda: _sparse([5], [float("nan")]), r"vals holds 1 values"),
        (lambda: kernels.check_bias(torch.tensor([1.0, 70000.0]).half()), r"bias holds 1 values .* in float16"),
        # CSR: positions once, integers, in range.
        (lambda: _sparse([5, 9, 5], [1.0, 2.0, 3.0]), r"1 positions more than once, first out_feature 0, in_feature 5"),
        (lambda: _sparse([-1], [1.0]), r"cols holds -1\.\.-1, expected 0\.\.63"),
        (lambda: _sparse([1.5], [1.0]), r"cols is torch\.float32, expected integers"),
        (
            lambda: _packed(
                n=2, sparse=(torch.tensor([0, 200, 1], dtype=torch.uint8), torch.tensor([1]), torch.ones(1))
            ),
            r"rows must rise from 0 to nnz = 1",
        ),
        (lambda: kernels.pack(lambda a, b: _codes(), TABLE, bits=4), r"shape=\(n, k\) is needed"),
        (
            lambda: kernels.pack(_codes(), TABLE, bits=4, sparse=(torch.zeros(3), torch.zeros(0), torch.zeros(0))),
            r"rows has shape \[3\], expected \[7\]",
        ),
        (
            lambda: kernels.pack(
                _codes(1), TABLE, bits=4, sparse=(torch.tensor([0, 1]), torch.tensor([64]), torch.ones(1))
            ),
            r"cols holds 64\.\.64, expected 0\.\.63",
        ),
        (lambda: kernels.from_squeezellm(torch.zeros(8, 6), TABLE), r"qweight is torch\.float32"),
        (lambda: kernels.from_squeezellm(_words(8, 6), torch.zeros(6, 5)), r"5 entries per channel"),
        (lambda: kernels.from_squeezellm(_words(7, 6), torch.zeros(6, 8)), r"7 rows of words hold no whole number"),
        (lambda: kernels.from_awq(_words(64, 2), _words(2, 2), torch.ones(3, 16)), r"scales has shape \[3, 16\]"),
        (lambda: kernels.from_awq(_words(64, 2), _words(1, 2), torch.ones(2, 16)), r"qzeros has shape \[1, 2\]"),
        (
            lambda: kernels.from_gptq(
                _words(8, 16), _words(2, 2), torch.ones(2, 16), bits=4, g_idx=torch.arange(64).int().flip(0)
            ),
            r"g_idx is not in order: quantized with act-order",
        ),
        (lambda: kernels.from_nf4(torch.zeros(9, dtype=torch.uint8), torch.ones(1), (2, 8)), r"with 9 bytes, .* 8"),
        (lambda: kernels.from_nf4(torch.zeros(8, dtype=torch.uint8), torch.ones(3), (2, 8)), r"absmax has 3 blocks"),
        (lambda: kernels.instruction_set("sse9"), r"instruction set sse9 is not available"),
    ],
)
def test_packing_says_what_is_wrong(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def _packed(n: int = 6, **arguments: Any) -> kernels.PackedWeight:
    return kernels.pack(_codes(n), **{"table": torch.ones(1, 16), "bits": 4, **arguments})


def _sparse(cols: list[float], vals: list[float]) -> kernels.PackedWeight:
    return _packed(n=1, sparse=(torch.tensor([0, len(cols)]), torch.tensor(cols), torch.tensor(vals)))


def test_the_largest_weights_that_stay_finite_are_taken() -> None:
    largest = torch.finfo(torch.bfloat16).max
    weight = _packed(table=torch.full((1, 16), largest))
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.zeros(3, 64, dtype=dtype)
        x[:, 0] = 1
        assert torch.isfinite(kernels.linear(x, weight)).all()


def _words(rows: int, columns: int) -> torch.Tensor:
    return torch.zeros(rows, columns, dtype=torch.int32)


def test_the_original_tensors_are_left_alone() -> None:
    codes, table = torch.randint(0, 16, (9, 40), dtype=torch.uint8), torch.randn(9, 16)
    before = codes.clone(), table.clone()
    kernels.pack(codes, table, bits=4)
    assert torch.equal(codes, before[0])
    assert torch.equal(table, before[1])
    case = codebook(4, 32, 4)
    x = torch.randn(3, 32)
    kept = x.clone()
    kernels.linear(x, case.weight)
    assert torch.equal(x, kept)
