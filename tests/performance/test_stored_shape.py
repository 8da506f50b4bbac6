"""What a prediction takes from the schemes of a model's linears: sizes, bits, and the experts that a step reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from helpers.checkpoints import Spec
from helpers.predicted import MIXTRAL, UNIT, flat, model
from quantserve.api import Checkpoint, K, Linear, N, Part, Scheme, linears
from quantserve.checks.stored import Stored, stored_linears
from quantserve.predict.machine import linear_cost
from quantserve.predict.shape import Shape, read_shape, stored_bits_per_weight
from quantserve.predict.step import StepCost, batch_of, step_cost
from quantserve.target import find_target

A100 = find_target("a100-80g")
INT4 = Scheme({"codes": Part((N(), K(2)), ("U8",)), "scales": Part((N(), K(128)), ("F16",))}, bits=4, group_size=128)
INT8 = Scheme({"codes": Part((N(), K()), ("I8",))}, bits=8, scales="none", activation_bits=8)
SMALL: dict[str, Any] = {**MIXTRAL, "num_hidden_layers": 2}
# The same numbers under a type whose tensor names the core does not know.
UNKNOWN: dict[str, Any] = {**SMALL, "model_type": "phimoe", "architectures": ["PhiMoEForCausalLM"]}


def stored(scheme_of: Callable[[Linear], Scheme | None], config: Mapping[str, Any]) -> tuple[Checkpoint, Stored]:
    """The files of a Mixtral whose linears are in these schemes, under this config."""
    tensors: dict[str, Spec] = {}
    for linear in linears(Checkpoint.from_tensors(SMALL)):
        scheme = scheme_of(linear)
        for name in linear.names:
            if scheme is None:
                tensors[f"{name}.weight"] = ("BF16", (linear.n, linear.k))
            else:
                for suffix in scheme.parts:
                    part = scheme.alternatives(suffix)[0]
                    sizes = tuple(size or 0 for size in part.sizes(linear.n, linear.k))
                    tensors[f"{name}.{suffix}"] = (part.dtypes[0], sizes)
    every: dict[str, Any] = dict(tensors)
    checkpoint = Checkpoint.from_tensors(config, every)
    return checkpoint, stored_linears(checkpoint, scheme_of)


def shape_of(scheme_of: Callable[[Linear], Scheme | None], config: Mapping[str, Any] = SMALL, ranks: int = 1) -> Shape:
    checkpoint, made = stored(scheme_of, config)
    shape = read_shape(checkpoint, model(ranks), A100, made)
    assert shape is not None
    return shape


def only_experts(linear: Linear) -> Scheme | None:
    return INT4 if "experts" in linear.name else None


def cost(shape: Shape, tokens: int) -> StepCost:
    """Memory alone, as on a machine of endless FLOP/s."""
    machine = replace(UNIT, flops=1e30)
    quantized, plain = linear_cost(machine, flat(4), "m"), linear_cost(machine, flat(16), "p")
    return step_cost(shape, machine, quantized, plain, batch_of([(1, 0, True)] * tokens))


@pytest.mark.parametrize("config", [SMALL, UNKNOWN])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_matrices_are_those_of_the_config(config: dict[str, Any], ranks: int) -> None:
    """Also where the core does not know the names: the schemes give the sizes."""
    usual = read_shape(Checkpoint.from_tensors(SMALL), model(ranks), A100)
    assert usual is not None
    made = shape_of(lambda linear: INT4, config, ranks)

    def sizes(shape: Shape) -> set[tuple[bool, int, int, int]]:
        return {(part is shape.expert, m.n, m.k, m.count) for part in (shape.dense, shape.expert) for m in part}

    assert sizes(made) == sizes(usual)
    assert {matrix.bits for matrix in (*made.dense, *made.expert)} == {4.125}
    assert made.linear_weights == usual.linear_weights


@pytest.mark.parametrize("config", [SMALL, UNKNOWN])
def test_each_matrix_has_its_bits(config: dict[str, Any]) -> None:
    shape = shape_of(only_experts, config)
    assert {(matrix.bits, matrix.quantized) for matrix in shape.dense} == {(16, False)}
    assert {(matrix.bits, matrix.quantized) for matrix in shape.expert} == {(4.125, True)}
    mixed = shape_of(lambda linear: INT8 if linear.fused == "qkv_proj" else INT4, config)
    assert {matrix.bits for matrix in mixed.dense} == {8, 4.125}


def test_a_step_reads_the_experts_that_are_chosen_in_their_bits() -> None:
    """One token: 2 of 8 experts in 4.125 bits, and everything else in 16."""
    shape = shape_of(only_experts)
    each = sum(matrix.weights * matrix.count for matrix in shape.expert)
    dense = sum(matrix.weights * matrix.count for matrix in shape.dense)
    assert cost(shape, 1).linears == pytest.approx(2 * each * 4.125 / 8 + dense * 2)
    assert cost(shape, 10_000).linears == pytest.approx(8 * each * 4.125 / 8 + dense * 2)


def test_the_engine_may_keep_more_than_is_stored() -> None:
    kept = replace(INT4, kept=8.25)
    checkpoint, made = stored(lambda linear: kept, SMALL)
    assert stored_bits_per_weight(checkpoint, made) == 8.25
    shape = read_shape(checkpoint, model(), A100, made)
    assert shape is not None
    assert {matrix.bits for matrix in (*shape.dense, *shape.expert)} == {8.25}


def test_the_bits_of_a_method_are_those_of_its_linears() -> None:
    checkpoint, made = stored(only_experts, SMALL)
    assert stored_bits_per_weight(checkpoint, made) == 4.125


def test_a_measured_time_follows_the_bits_of_the_matrix() -> None:
    machine = replace(UNIT, kernels={"m": [(1, 1e-9)]})
    found = linear_cost(machine, flat(4), "m", 4.0)
    assert found.seconds(1, 10, 10, 8.0) == pytest.approx(2 * found.seconds(1, 10, 10))
