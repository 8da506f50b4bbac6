"""Thousands of odd arguments through the public functions: a result of the right shape or an exception, no crash."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

import quantserve_kernels as kernels

CASES = 2000
DTYPES = (
    torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float32,
    torch.float64, torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip
SIZES = (0, 1, 2, 3, 5, 8, 16, 31, 32, 33, 64, 96, 128)
# What callers are promised, and what torch raises on the way for what is no tensor or has no such operation.
RAISED = (ValueError, TypeError, RuntimeError, AttributeError, IndexError)


class Odd:
    """Arguments that fit, each replaced by an odd one now and then."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)

    def of(self, *values: Any) -> Any:
        return self.random.choice(values)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, low: int = 0, high: int = 16) -> Any:
        """Of this shape and dtype, mostly."""
        if self.random.random() < 0.08:
            shape = self.of(shape[:-1], (*shape, 1), tuple(self.of(*SIZES) for _ in shape), shape[::-1])
        if self.random.random() < 0.06:
            dtype = self.of(*DTYPES)
        if self.random.random() < 0.06:
            low, high = self.of((-3, 3), (0, 300), (2**31 - 2, 2**31), (-(2**31), 0))
        made = torch.randint(low, high, shape, dtype=torch.int64)
        made = (made + torch.rand(shape)).to(dtype) if dtype.is_floating_point else made.to(dtype)
        if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) and self.random.random() < 0.04:
            made = made * self.of(float("nan"), float("inf"), 1e38, 1e-40)
        if made.ndim == 2 and self.random.random() < 0.1:
            made = self.of(made.t().contiguous().t(), made.repeat(1, 2)[:, ::2], made.to("meta"), made.requires_grad_()
                           if made.is_floating_point() else made)  # fmt: skip
        return made if self.random.random() > 0.01 else self.of(None, 3, "codes", [made])

    def number(self, value: int) -> Any:
        return value if self.random.random() > 0.04 else self.of(0, -1, -value, value + 1, 2**31, 2**40, 1.5, "4", None)

    def sparse(self, n: int, k: int) -> Any:
        if self.random.random() < 0.5:
            return None
        nnz = self.of(0, 1, 3, 20)
        rows = torch.randint(0, nnz + 1, (n + 1,)).sort().values
        rows[0], rows[-1] = 0, nnz
        if self.random.random() < 0.1:
            rows = rows[torch.randperm(n + 1)] - self.of(0, 1)
        cols = torch.randperm(max(k, nnz))[:nnz] if self.random.random() < 0.9 else torch.randint(-2, k + 2, (nnz,))
        return rows.to(self.of(torch.int32, torch.int64, torch.uint8)), cols, self.tensor((nnz,), torch.float32)


def _pack(odd: Odd) -> kernels.PackedWeight:
    n, k, bits = odd.of(*SIZES[1:]), odd.of(*SIZES[1:]), odd.of(*kernels.BITS)
    group = odd.of(-1, -1, k, 1, 3, 16, 32, 64)
    groups = 1 if group == -1 else max(1, k // group)
    scaled = odd.of(True, False)
    codes = odd.tensor((n, k), torch.uint8, 0, 2**bits)
    of_strips: Callable[[int, int], Any] = lambda first, last: codes[first:last]  # noqa: E731
    return kernels.pack(
        odd.of(codes, of_strips),
        odd.tensor((odd.of(1, n), 2**bits), torch.float32),
        bits=odd.number(bits),
        shape=odd.of((n, k), (odd.number(n), odd.number(k))),
        scales=odd.tensor((n, groups), odd.of(torch.float16, torch.float32)) if scaled else None,
        zeros=odd.tensor((n, groups), torch.float16) if odd.of(scaled, scaled, False) else None,
        group_size=odd.number(group),
        sparse=odd.sparse(n, k),
    )


def _squeezellm(odd: Odd) -> kernels.PackedWeight:
    n, k, bits = odd.of(*SIZES[1:]), odd.of(32, 64, 96), odd.of(*kernels.BITS)
    words = odd.tensor((k * bits // 32, n), torch.int32, -(2**31), 2**31)
    return kernels.from_squeezellm(words, odd.tensor((n, 2**bits), torch.float32), odd.sparse(n, k))


def _awq(odd: Odd) -> kernels.PackedWeight:
    n, k, groups = odd.of(8, 16, 64), odd.of(32, 64, 96), odd.of(1, 2, 3)
    return kernels.from_awq(
        odd.tensor((k, n // 8), torch.int32, -(2**31), 2**31),
        odd.tensor((groups, n // 8), torch.int32, -(2**31), 2**31),
        odd.tensor((groups, n), torch.float16),
    )


def _gptq(odd: Odd) -> kernels.PackedWeight:
    n, k, bits, groups = odd.of(32, 64), odd.of(32, 64, 96), odd.of(*kernels.BITS), odd.of(1, 2, 3)
    return kernels.from_gptq(
        odd.tensor((k * bits // 32, n), torch.int32, -(2**31), 2**31),
        odd.tensor((groups, n * bits // 32), torch.int32, -(2**31), 2**31),
        odd.tensor((groups, n), torch.float16),
        bits=odd.number(bits),
        zero_offset=odd.of(0, 1),
        g_idx=odd.of(None, torch.arange(k) // max(1, k // groups), odd.tensor((k,), torch.int32)),
    )


def _nf4(odd: Odd) -> kernels.PackedWeight:
    n, k, block = odd.of(1, 3, 8), odd.of(32, 64, 128), odd.of(16, 32, 64)
    return kernels.from_nf4(
        odd.tensor((n, k // 2), torch.uint8, 0, 256),
        odd.tensor((max(1, n * k // block),), torch.float32),
        (odd.number(n), odd.number(k)),
        odd.of(None, odd.tensor((16,), torch.float32)),
    )


def test_odd_arguments_give_a_result_or_an_exception() -> None:
    results: Counter[str] = Counter()
    for seed in range(CASES):
        odd = Odd(seed)
        make = odd.of(_pack, _pack, _squeezellm, _awq, _gptq, _nf4)
        try:
            weight = make(odd)
            x = odd.tensor((odd.of(0, 1, 2, 5, 17), weight.k), odd.of(torch.float32, torch.bfloat16, torch.float16))
            y = kernels.linear(x, weight, odd.of(None, odd.tensor((weight.n,), torch.float32)))
        except RAISED as error:
            results[type(error).__name__] += 1
            continue
        assert y.shape == (*x.shape[:-1], weight.n), f"seed {seed}: {make.__name__}"
        results["result"] += 1
    assert results["result"] > CASES / 10, results
    assert results["ValueError"] > CASES / 10, results
