"""Mixtures of experts against float64 and vLLM, on every instruction set, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

import quantserve_kernels as kernels
from kernel_cases import Case, affine, codebook, nf4, relative_error
from quantserve_kernels import _experts, _ops
from quantserve_kernels._arguments import NUMBERS, TENSORS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ERROR = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.fixture(params=_ops.instruction_sets())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.instruction_set()
    if before != "torch":
        kernels.instruction_set(request.param)
    yield request.param
    if before != "torch":
        kernels.instruction_set(before)


@dataclass(frozen=True)
class Mixture:
    """The experts of a layer: packed, and as the matrices [experts, n, k] that they mean."""

    w13: kernels.PackedWeight
    w2: kernels.PackedWeight
    up: Tensor
    down: Tensor
    bias13: Tensor | None = None
    bias2: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.up)

    @property
    def hidden(self) -> int:
        return self.w13.k

    def with_bias(self) -> Mixture:
        g = torch.Generator().manual_seed(4)
        biases = (torch.randn(matrix.shape[:2], generator=g) for matrix in (self.up, self.down))
        return replace(self, bias13=next(biases), bias2=next(biases))

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, activation: str = "silu") -> Tensor:
        return kernels.experts(
            x, self.w13, self.w2, ids, weights, activation=activation, w13_bias=self.bias13, w2_bias=self.bias2
        )

    def expected(
        self, x: Tensor, ids: Tensor, weights: Tensor, activation: str = "silu", dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """In dense matrices, each step rounded to the dtype."""
        out = torch.zeros(x.shape, dtype=torch.float64)
        for expert in ids.unique().tolist():
            if expert >= 0:
                bias13, bias2 = (None if b is None else b[expert].to(dtype) for b in (self.bias13, self.bias2))
                h = linear(x.to(dtype), self.up[expert].to(dtype), bias13)
                y = linear(_activated(h, activation), self.down[expert].to(dtype), bias2)
                out += (weights.double() * (ids == expert)).sum(1, keepdim=True) * y.double()
        return out


def _activated(h: Tensor, activation: str) -> Tensor:
    if activation == "swigluoai":  # gpt-oss's reference
        gate, up = h[..., 0::2].clamp(max=7.0), h[..., 1::2].clamp(min=-7.0, max=7.0)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))
    gate, up = h[..., : h.shape[-1] // 2], h[..., h.shape[-1] // 2 :]
    return up * {"silu": silu(gate), "gelu": gelu(gate), "gelu_tanh": gelu(gate, approximate="tanh")}[activation]


def _mixture(count: int, up: Callable[[int], Case], down: Callable[[int], Case]) -> Mixture:
    ups, downs = [up(10 + expert) for expert in range(count)], [down(50 + expert) for expert in range(count)]
    scale = [torch.stack([case.matrix for case in cases]) for cases in (ups, downs)]
    return Mixture(*(kernels.concatenate([case.weight for case in cases]) for cases in (ups, downs)), *scale)


@cache
def _mixtures(bits: int) -> list[Mixture]:
    return [
        _mixture(3, lambda s: codebook(12, 20, bits, seed=s), lambda s: codebook(20, 6, bits, seed=s)),
        _mixture(
            5,
            lambda s: codebook(72, 132, bits, sparse=0.02, seed=s),
            lambda s: codebook(132, 36, bits, sparse=0.02 * (s % 2), seed=s),
        ),
        _mixture(
            2,
            lambda s: affine(128, 96, bits, 32, seed=s),
            lambda s: affine(96, 64, bits, 16, sparse=0.05, seed=s),
        ),
        _mixture(4, lambda s: affine(48, 80, bits, -1, zeros=False, seed=s), lambda s: affine(80, 24, bits, 3, seed=s)),
        _mixture(1, lambda s: affine(256, 128, bits, 128, seed=s), lambda s: affine(128, 128, bits, 64, seed=s)),
    ]


def _routed(mixture: Mixture, tokens: int, choices: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x in float32, ids with repetitions and some -1, weights."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, mixture.count, (tokens, choices), generator=g)
    return torch.randn(tokens, mixture.hidden, generator=g), ids, torch.rand(tokens, choices, generator=g)


def _check(mixture: Mixture, x: Tensor, ids: Tensor, weights: Tensor, activation: str = "silu") -> None:
    # Weights with which the results are about 1: within float16 and above its subnormal numbers.
    size = mixture.expected(x, ids, weights, activation).square().mean().sqrt().float()
    weights = weights / size if size > 0 else weights
    y = mixture(x, ids, weights, activation)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    error = relative_error(y, mixture.expected(x, ids, weights, activation))
    assert error <= ERROR[x.dtype], f"{list(x.shape)} {x.dtype} {activation}: {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", kernels.BITS)
def test_every_format_and_odd_shape(isa: str, bits: int, dtype: torch.dtype) -> None:
    for mixture in _mixtures(bits):
        for tokens, choices in ((0, 2), (1, 1), (1, 4), (3, 2), (9, 0), (40, 3)):
            x, ids, weights = _routed(mixture, tokens, choices, seed=tokens)
            _check(mixture, x.to(dtype), ids if tokens % 2 else ids.int(), weights)
    _check(mixture.with_bias(), x.to(dtype), ids, weights)


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_activations(isa: str, activation: str) -> None:
    mixture = _mixture(3, lambda s: nf4(64, 128, 64, s), lambda s: codebook(128, 32, 3, seed=s)).with_bias()
    for dtype in DTYPES:
        x, ids, weights = _routed(mixture, 7, 2)
        _check(mixture, x.to(dtype), ids, weights, activation)
        _check(mixture, (x * 4).to(dtype), ids, weights, activation)  # where they are flat, or clamped


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_vllm_means_the_same(activation: str) -> None:
    ops = pytest.importorskip("vllm._custom_ops")
    mixture = _mixture(6, lambda s: affine(128, 64, 4, 32, seed=s), lambda s: affine(64, 64, 4, 64, seed=s)).with_bias()
    x, ids, weights = _routed(mixture, 20, 3)
    x, ids = x.bfloat16(), ids.clamp(min=0).int()
    packed = [ops.cpu_prepack_moe_weight(matrix.bfloat16(), "vec") for matrix in (mixture.up, mixture.down)]
    assert mixture.bias13 is not None
    assert mixture.bias2 is not None
    biases = (mixture.bias13.bfloat16(), mixture.bias2.bfloat16())
    out = torch.empty_like(x)
    ops.cpu_fused_moe(out, x, *packed, *biases, weights, ids, activation, "vec", False)
    y = kernels.experts(
        x, mixture.w13, mixture.w2, ids, weights, activation=activation, w13_bias=biases[0], w2_bias=biases[1]
    )
    assert relative_error(y, out.double()) < 5e-3


@pytest.mark.parametrize("tokens", [1, 4, 16, 70])
@pytest.mark.parametrize("kind", ["affine", "codebook", "nf4"])
def test_the_error_is_at_most_that_of_bfloat16_experts(isa: str, kind: str, tokens: int) -> None:
    made: dict[str, Callable[[int, int, int], Case]] = {
        "affine": lambda n, k, s: affine(n, k, 4, 128, seed=s),
        "codebook": lambda n, k, s: codebook(n, k, 4, seed=s),
        "nf4": lambda n, k, s: nf4(n, k, 64, s),
    }
    mixture = _mixture(4, lambda s: made[kind](512, 512, s), lambda s: made[kind](512, 256, s))
    x, ids, weights = _routed(mixture, tokens, 3)
    x = (x / 8).bfloat16()
    expected = mixture.expected(x, ids, weights)
    plain = mixture.expected(x, ids, weights, dtype=torch.bfloat16)
    assert relative_error(mixture(x, ids, weights), expected) <= 1.05 * relative_error(plain, expected)


def test_all_tokens_may_choose_one_expert(isa: str) -> None:
    mixture = _mixtures(4)[1]
    for dtype in DTYPES:
        x, ids, weights = _routed(mixture, 150, 2)
        _check(mixture, (x / 8).to(dtype), torch.full_like(ids, 3), weights)
    assert not mixture(x, torch.full_like(ids, -1), weights).any()


def test_more_pairs_than_are_computed_at_once(isa: str) -> None:
    mixture = _mixtures(2)[0]
    x, ids, weights = _routed(mixture, 2100, 8)
    y = mixture(x, ids, weights)
    some = torch.arange(0, 2100, 70)
    assert relative_error(y[some], mixture.expected(x[some], ids[some], weights[some])) < ERROR[torch.float32]


def test_the_number_of_threads_changes_nothing(isa: str) -> None:
    before = torch.get_num_threads()
    mixture = _mixture(
        4, lambda s: affine(512, 384, 4, 128, seed=s), lambda s: codebook(384, 256, 3, sparse=0.02, seed=s)
    )
    try:
        for tokens in (1, 5, 300):
            x, ids, weights = _routed(mixture, tokens, 3)
            answers = []
            for threads in (1, 2, 9):
                torch.set_num_threads(threads)
                answers.append(mixture(x.bfloat16(), ids, weights))
            assert torch.equal(answers[0], answers[1])
            assert torch.equal(answers[0], answers[2])
    finally:
        torch.set_num_threads(before)


def test_values_that_are_not_finite_stay_in_their_rows(isa: str) -> None:
    for mixture in (_mixtures(4)[1], _mixtures(4)[2]):
        for value in (float("inf"), float("nan")):
            for tokens in (2, 12):
                x, ids, weights = _routed(mixture, tokens, 2)
                ids[-1] = 1
                x[-1, 3] = value
                y = mixture(x, ids, weights)
                assert torch.isfinite(y[:-1]).all()
                assert not torch.isfinite(y[-1]).any()


def test_strided_arguments_are_taken_as_they_are() -> None:
    mixture = _mixtures(4)[0]
    _, ids, weights = _routed(mixture, 6, 2)
    wide = torch.randn(6, 2 * mixture.hidden, generator=torch.Generator().manual_seed(1))
    _check(mixture, wide[:, ::2], ids.t().contiguous().t(), weights.t().contiguous().t())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plain_torch_operator_agrees(dtype: torch.dtype) -> None:
    for mixture in (*_mixtures(3), _mixtures(4)[1].with_bias()):
        x, ids, weights = _routed(mixture, 5, 2)
        x = (x / 8).to(dtype)
        for activation in kernels.ACTIVATIONS:
            y = _ops._plain_experts(*_arguments(mixture, x, ids, weights, activation).values())
            assert relative_error(y, mixture.expected(x, ids, weights, activation)) < ERROR[dtype]


def test_it_is_one_node_under_compile_and_shapes_may_change() -> None:
    mixture = _mixtures(4)[2]
    compiled = torch.compile(mixture.__call__, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (2, 5, 40):
        routed = _routed(mixture, tokens, 2)
        assert torch.equal(compiled(*routed), mixture(*routed))
    checks = torch.library.opcheck(
        torch.ops.quantserve_kernels.codebook_experts,
        tuple(_arguments(mixture, *_routed(mixture, 3, 2)).values()),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(checks.values()) == {"SUCCESS"}


# --- what is refused --------------------------------------------------------------------------------------------------


def _arguments(mixture: Mixture, x: Tensor, ids: Tensor, weights: Tensor, activation: str = "silu") -> dict[str, Any]:
    """Of the operator, in order."""
    arguments: dict[str, Any] = {"x": x, "ids": ids, "weights": weights, "activation": activation}
    for name, weight, bias in (("w13", mixture.w13, mixture.bias13), ("w2", mixture.w2, mixture.bias2)):
        arguments |= {f"{name}_{tensor}": getattr(weight, tensor) for tensor in TENSORS} | {f"{name}_bias": bias}
    for name, weight in (("w13", mixture.w13), ("w2", mixture.w2)):
        arguments |= {f"{name}_{number}": getattr(weight, number) for number in NUMBERS}
    return arguments


OPERATORS = {"compiled": lambda *a: torch.ops.quantserve_kernels.codebook_experts(*a), "plain": _ops._plain_experts}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 131)}, r"x has shape \[3, 131\], expected \[tokens, 132\] \(w13_k\)"),
        ({"x": torch.randn(132)}, r"x has shape \[132\]"),
        ({"x": torch.randn(3, 132).double()}, r"x is .*ouble|x is torch.float64"),
        ({"x": torch.randn(4, 132)}, r"topk_ids has shape \[3, 2\], expected \[4, choices\]"),
        ({"ids": torch.tensor([[0, 1], [2, 5], [0, 0]])}, r"topk_ids.*5, expected -1.*4"),
        ({"ids": torch.tensor([[0, 1], [2, -2], [0, 0]])}, r"topk_ids.*-2.*, expected -1.*4"),
        ({"ids": torch.tensor([[0, 1], [2, 2**40], [0, 0]])}, r"topk_ids.*1099511627776"),
        ({"ids": torch.zeros(3)}, r"topk_ids has shape \[3\]"),
        ({"ids": torch.zeros(3, 2)}, r"topk_ids is .*, expected"),
        ({"weights": torch.zeros(3, 1)}, r"topk_weights has shape \[3, 1\], expected \[3, 2\]"),
        ({"weights": torch.zeros(3, 2).half()}, r"topk_weights is .*alf|topk_weights is torch.float16"),
        ({"activation": "relu"}, r"activation is relu; known: silu, gelu, gelu_tanh, swigluoai"),
        ({"w13_bias": torch.zeros(5, 71)}, r"w13_bias has shape \[5, 71\], expected \[5, 72\]"),
        ({"w2_bias": torch.zeros(5, 132, dtype=torch.int32)}, r"w2_bias is"),
        ({"w13_codes": torch.zeros(7, dtype=torch.uint8)}, r"w13_codes has shape \[7\]"),
        ({"w2_table": torch.zeros(7, 16)}, r"w2_table has shape \[7, 16\]"),
        ({"w2_rows": torch.zeros(3, dtype=torch.int32)}, r"w2_rows has shape \[3\], expected \[661\]"),
        ({"w2_scales": torch.zeros(165, 2, 4)}, r"w2_scales has shape \[165, 2, 4\]"),
        ({"w2_bits": 5}, r"bits is 5"),
        ({"w13_k": -132}, r"-132"),
        ({"w2_n": 2**40}, r"1099511627776|w2_codes"),
    ],
)
def test_the_operator_refuses_what_does_not_fit(change: dict[str, Any], message: str, operator: str) -> None:
    arguments = _arguments(_mixtures(4)[1], *_routed(_mixtures(4)[1], 3, 2))
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        OPERATORS[operator](*{**arguments, **change}.values())


@pytest.mark.parametrize("operator", OPERATORS)
def test_weights_that_are_no_experts_are_refused(operator: str) -> None:
    x, ids, weights = torch.randn(2, 40), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    for up, down, message in (
        (
            codebook(24, 40, 4),
            codebook(40, 8, 4),
            r"w13 is \[24, 40\] and w2 \[40, 8\], expected \[experts \* 16, 40\]",
        ),
        (codebook(16, 40, 4), codebook(44, 8, 4), r"w2 \[44, 8\], expected .* \[experts \* 40, 8\]"),
        (codebook(16, 40, 4), codebook(20, 8, 4), r"w2 \[20, 8\]"),
        (codebook(12, 38, 4), codebook(38, 6, 4), r"w13_k 38 one of 4"),
        (codebook(14, 40, 4), codebook(40, 7, 4), r"2 \* w2_k, 14, must be a multiple of 4"),
    ):
        mixture = Mixture(up.weight, down.weight, up.matrix[None], down.matrix[None])
        with pytest.raises(ValueError, match=message):
            OPERATORS[operator](*_arguments(mixture, x, ids, weights).values())


@pytest.mark.skipif(not kernels.status().native, reason="the operators are not compiled here")
@pytest.mark.parametrize("tokens", [1, 2, 30])
def test_a_broken_sparse_part_is_refused(isa: str, tokens: int) -> None:
    for name in ("w13", "w2"):
        for tensor, value in (("cols", 10**6), ("cols", -1), ("rows", -5), ("rows", 10**6)):
            arguments = _arguments(_mixtures(4)[1], *_routed(_mixtures(4)[1], tokens, 3))
            arguments["ids"] = torch.full_like(arguments["ids"], 1)
            arguments[f"{name}_{tensor}"] = torch.full_like(arguments[f"{name}_{tensor}"], value)
            with pytest.raises(ValueError, match="no CSR matrix"):
                OPERATORS["compiled"](*arguments.values())


def test_weights_that_differ_are_not_concatenated() -> None:
    first = affine(16, 64, 4, 32).weight
    for other, message in (
        (affine(16, 64, 4, 64).weight, r"weight 1 has .*, group size 64, .* and weight 0 .*, group size 32"),
        (affine(16, 64, 4, 32, zeros=False).weight, r"weight 1 has .* no zeros"),
        (codebook(16, 64, 4).weight, r"weight 1 has .* no scales"),
        (codebook(16, 64, 3).weight, r"3 bits"),
        (affine(12, 64, 4, 32).weight, r"weight 1 is \[12, 64\] in the layout cpu, expected .* multiple of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.concatenate([first, other])
    with pytest.raises(ValueError, match=r"weight 0 is \[6, 64\] .* multiple of 4"):
        kernels.concatenate([codebook(6, 64, 4).weight])
    with pytest.raises(ValueError, match="no weights"):
        kernels.concatenate([])


def test_concatenated_weights_are_the_matrices_one_below_the_other() -> None:
    for cases in (
        [affine(16, 64, 4, 32, seed=1), affine(48, 64, 4, 32, sparse=0.1, seed=2), affine(32, 64, 4, 32, seed=3)],
        [codebook(4, 50, 3, seed=1), codebook(16, 50, 3, sparse=0.2, seed=2)],
        [nf4(16, 64, 32, 1), nf4(16, 64, 32, 2)],
    ):
        weight = kernels.concatenate([case.weight for case in cases])
        matrix = torch.cat([case.matrix for case in cases])
        assert relative_error(weight.dequantize(torch.float64), matrix) < 1e-6
        x = torch.randn(3, weight.k, generator=torch.Generator().manual_seed(1))
        assert relative_error(kernels.linear(x, weight), x.double() @ matrix.t()) < 1e-5


def test_shared_tables_that_differ_become_a_table_per_channel() -> None:
    one, other = (affine(16, 96, 4, 48, sparse=0.1, seed=seed).weight for seed in (1, 2))
    other = replace(other, table=other.table + 0.5)
    weight = kernels.concatenate([one, other])
    assert weight.table.shape == (32, 16)
    matrix = torch.cat([one.dequantize(torch.float64), other.dequantize(torch.float64)])
    assert relative_error(weight.dequantize(torch.float64), matrix) < 1e-6
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    assert relative_error(kernels.linear(x, weight), x.double() @ matrix.t()) < 1e-5


def test_weights_for_a_gpu_are_refused() -> None:
    mixture = _mixtures(4)[0]
    gpu = replace(mixture.w2, codes=torch.zeros(60, 32, dtype=torch.int32))
    with pytest.raises(ValueError, match="w2 is packed for a GPU, and experts are computed on CPUs only"):
        _experts.experts(*_routed(mixture, 2, 2)[:1], mixture.w13, gpu, *_routed(mixture, 2, 2)[1:])
