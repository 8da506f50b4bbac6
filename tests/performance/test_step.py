"""The cost of one engine step, against cases worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helpers.predicted import LLAMA_7B, LLAMA_70B, MISTRAL, MIXTRAL, QWEN, TINY, UNIT, flat, model
from quantserve.checkpoint import Checkpoint
from quantserve.predict.imagine import imagined
from quantserve.predict.machine import EngineCost, Machine, linear_cost, measured_at, share_at
from quantserve.predict.shape import Shape, read_shape, stored_bits_per_weight
from quantserve.predict.step import StepCost, batch_of, step_cost
from quantserve.target import find_target

A100 = find_target("a100-80g")


def shape_of(config: dict[str, object], ranks: int = 1, **kwargs: object) -> Shape:
    shape = read_shape(Checkpoint.from_tensors(config), model(ranks, **kwargs), A100)
    assert shape is not None
    return shape


def cost(shape: Shape, parts: list[tuple[float, float, bool]], machine: Machine = UNIT, bits: float = 16) -> StepCost:
    quantized, plain = linear_cost(machine, flat(bits), "m"), linear_cost(machine, flat(16), "p")
    return step_cost(shape, machine, quantized, plain, batch_of(parts, shape.window))


@pytest.mark.parametrize(
    ("config", "parameters"), [(LLAMA_7B, 6_738_415_616), (LLAMA_70B, 68_976_648_192), (MIXTRAL, 46_702_792_704)]
)
def test_weights_are_those_of_the_published_models(config: dict[str, object], parameters: int) -> None:
    """What is not in the linears: two embeddings, two norms a layer and one more, Mixtral's router."""
    shape = shape_of(config)
    layers, hidden = int(str(config["num_hidden_layers"])), int(str(config["hidden_size"]))
    rest = (
        2 * 32000 * hidden + (2 * layers + 1) * hidden + layers * hidden * int(str(config.get("num_local_experts", 0)))
    )
    assert shape.linear_weights + rest == parameters


def test_a_decode_step_reads_every_weight_once() -> None:
    """hidden 8, q 8, kv 2 x 2: a layer is qkv 16 x 8 + o 8 x 8 + gate_up 32 x 8 + down 8 x 16 = 576 weights."""
    slow = replace(UNIT, flops=1e9)
    made = cost(shape_of(TINY), [(1, 0, True)], slow)
    assert made.linears == 2 * 576 * 2
    assert made.lm_head == 10 * 8 * 2
    assert cost(shape_of(TINY), [(1, 0, True)], slow, bits=4).linears == 2 * 576 / 2


def test_a_prompt_is_bound_by_its_flops() -> None:
    fast = replace(UNIT, bandwidth=1e9)
    made = cost(shape_of(TINY), [(7, 0, True)], fast)
    assert made.linears == 2 * 7 * 2 * 576
    assert made.lm_head == 2 * 1 * 10 * 8
    # Causal: 7 + 6 + ... + 1 = 28 pairs, each 4 x 2 FLOPs in 4 heads of 2 layers.
    assert made.attention == pytest.approx(2 * 4 * 4 * 2 * 28)


def test_attention_reads_the_cache_of_the_kv_heads() -> None:
    """Two kv heads of 2: 2 x 2 x 2 elements of 2 bytes a token and layer, in two layers, 100 + 50 tokens."""
    made = cost(shape_of(TINY), [(1, 100, True), (1, 50, True)], replace(UNIT, flops=1e12))
    assert made.attention == pytest.approx(150 * 16 * 2)
    halved = cost(shape_of(TINY, kv_cache_dtype="fp8"), [(1, 100, True), (1, 50, True)], replace(UNIT, flops=1e12))
    assert halved.attention == pytest.approx(150 * 8 * 2)


def test_a_sliding_window_bounds_what_is_read() -> None:
    shape = shape_of(MISTRAL)
    fast = replace(UNIT, flops=1e18)
    assert shape.window == 4096
    long, window = cost(shape, [(1, 20000, True)], fast), cost(shape, [(1, 4096, True)], fast)
    assert long.attention == pytest.approx(window.attention, rel=1e-6)
    assert cost(shape_of(LLAMA_7B), [(1, 20000, True)], fast).attention > 4 * window.attention


def test_experts_that_nobody_chooses_are_not_read() -> None:
    """One token reads 2 of 8; two tokens 8 (1 - (3/4)^2) = 3.5; a thousand all."""
    shape = shape_of(MIXTRAL)
    assert shape.distinct_experts(1) == pytest.approx(2)
    assert shape.distinct_experts(2) == pytest.approx(3.5)
    assert shape.distinct_experts(1000) == pytest.approx(8)
    slow = replace(UNIT, flops=1e18)
    expert = 3 * 14336 * 4096 * 32
    attention = (4096 + 2 * 1024 + 4096) * 4096 * 32
    assert cost(shape, [(1, 0, True)], slow).linears == pytest.approx(2 * (attention + 2 * expert))
    assert cost(shape, [(1, 0, True)] * 2, slow).linears == pytest.approx(2 * (attention + 3.5 * expert))
    fast = replace(UNIT, bandwidth=1e18)
    assert cost(shape, [(100, 0, True)], fast).linears == pytest.approx(2 * 100 * (attention + 2 * expert))


def test_ranks_share_the_weights_and_pay_for_talking() -> None:
    """Two all-reduces a layer of tokens x hidden x 2 bytes; each of 4 ranks moves 3/2 of it."""
    engine = EngineCost(0.0, 0.0, 0.0, 0.0, 0.25, 0.5, 0.0)
    machine = replace(UNIT, flops=1e18, engine=engine)
    one, four = shape_of(LLAMA_70B), shape_of(LLAMA_70B, 4)
    assert four.linear_weights * 4 == one.linear_weights
    made = cost(four, [(1, 0, True)] * 10, machine)
    assert made.communication == pytest.approx(2 * 80 * (0.5 + 10 * 8192 * 2 * 1.5))
    assert made.overhead == 0.25
    assert cost(one, [(1, 0, True)] * 10, machine).communication == 0


def test_overhead_counts_steps_layers_and_sequences() -> None:
    machine = replace(UNIT, engine=EngineCost(100.0, 10.0, 1.0, 0.0, 0.0, 0.0, 0.0))
    assert cost(shape_of(TINY), [(1, 5, True)] * 3, machine).overhead == 100 + 2 * 10 + 3 * 1


def test_vectors_are_elements_or_bytes() -> None:
    """Per layer 8 x 8 + 3 x 8 + 2 x 4 + 3 x 16 = 144 elements a token."""
    assert cost(shape_of(TINY), [(5, 0, True)]).vectors == 5 * 2 * 144 * 2
    slow = replace(UNIT, engine=EngineCost(0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0))
    assert cost(shape_of(TINY), [(5, 0, True)], slow).vectors == 5 * 2 * 144 * 3


def test_shares_are_interpolated_between_logarithms_and_flat_outside() -> None:
    table = ((1, 0.1), (100, 0.4))
    assert share_at(table, 10) == pytest.approx(0.2)
    assert share_at(table, 0.5) == 0.1
    assert share_at(table, 10000) == 0.4


def test_measured_times_grow_with_the_rows_beyond_the_last() -> None:
    table = ((1, 1.0), (512, 64.0))
    assert measured_at(table, 1024) == 128.0
    assert measured_at(table, 1) == 1.0
    linear = linear_cost(replace(UNIT, kernels={"awq-4": table}), flat(4), "awq-4")
    assert linear.seconds(512, 3, 5) == 15 * 64
    assert linear.seconds(0, 3, 5) == 0


@pytest.mark.parametrize("bits", [3.0, 4.16, 8.5, 16.0])
@pytest.mark.parametrize("config", [LLAMA_7B, MIXTRAL, QWEN])
def test_imagined_files_have_the_bits_they_were_given(config: dict[str, object], bits: float) -> None:
    found = stored_bits_per_weight(imagined(Checkpoint.from_tensors(config), bits))
    assert found == pytest.approx(bits, rel=0.002)


def test_a_model_without_attention_or_sizes_has_no_shape() -> None:
    assert read_shape(Checkpoint.from_tensors(LLAMA_7B | {"model_type": "mamba"}), model(), A100) is None
    assert read_shape(Checkpoint.from_tensors({"model_type": "nobody-knows", "hidden_size": 64}), model(), A100) is None


def test_a_family_without_known_tensor_names_has_the_matrices_of_its_config() -> None:
    known = read_shape(Checkpoint.from_tensors(LLAMA_7B), model(), A100)
    other = read_shape(Checkpoint.from_tensors(LLAMA_7B | {"model_type": "olmo2"}), model(), A100)
    assert known is not None
    assert other is not None
    assert other.linear_weights == known.linear_weights


def test_a_family_without_known_tensor_names_has_the_matrices_of_its_files() -> None:
    tensors = {
        "model.layers.0.attn.wqkv.weight": ("BF16", (6144, 4096)),
        "model.layers.0.attn.wo.weight": ("BF16", (4096, 4096)),
        "model.layers.0.mlp.up.weight": ("BF16", (8192, 4096)),
        "vision_tower.layers.0.mlp.fc1.weight": ("BF16", (1024, 1024)),
    }
    shape = read_shape(Checkpoint.from_tensors(LLAMA_7B | {"model_type": "olmo2"}, tensors), model(), A100)
    assert shape is not None
    assert shape.linear_weights == (6144 + 4096 + 8192) * 4096
