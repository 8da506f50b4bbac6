"""What one engine step costs, part by part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from quantserve.predict.machine import LinearCost, Machine
from quantserve.predict.shape import Matrix, Shape


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes, on average numbers that need not be whole.

    Attributes:
        tokens: rows of x in the decoder's linears.
        sequences: sequences that take part.
        outputs: sequences that get a token: rows of x in lm_head.
        cached, window_cached: tokens of KV cache that are read, summed over the sequences, in a layer that sees
            everything and in one with a sliding window.
        pairs, window_pairs: (query, key) pairs of attention in such a layer.
    """

    tokens: float
    sequences: float
    outputs: float
    cached: float
    window_cached: float
    pairs: float
    window_pairs: float


def batch_of(parts: Iterable[tuple[float, float, bool]], window: int = 0) -> Batch:
    """A step of sequences given as (tokens computed now, tokens in the cache before, whether one comes out).

    A token sees itself and everything before it: t new tokens after c cached ones make t c + t (t + 1) / 2 pairs.
    """
    tokens = sequences = outputs = cached = window_cached = pairs = window_pairs = 0.0
    for new, before, gives in parts:
        tokens += new
        sequences += 1
        outputs += gives
        cached += before
        seen = new * before + new * (new + 1) / 2
        pairs += seen
        if window:
            window_cached += min(before, window)
            window_pairs += min(seen, new * window)
    return Batch(tokens, sequences, outputs, cached, window_cached, pairs, window_pairs)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of one step by part; `total` is their sum.

    Attributes:
        linears: the decoder's quantized (or not) matrices, active experts included.
        lm_head: the output projection.
        attention: reading the KV cache, and the products of prompts.
        vectors: norms, rotary embedding, gates: activations outside the matrices.
        communication: all-reduces between ranks.
        overhead: the engine's own.
    """

    linears: float
    lm_head: float
    attention: float
    vectors: float
    communication: float
    overhead: float

    @property
    def total(self) -> float:
        """The step, in seconds."""
        return self.linears + self.lm_head + self.attention + self.vectors + self.communication + self.overhead

    def to_json(self) -> dict[str, float]:
        """Milliseconds by part."""
        return {name: round(1000 * seconds, 4) for name, seconds in asdict(self).items()}


def step_cost(shape: Shape, machine: Machine, quantized: LinearCost, plain: LinearCost, batch: Batch) -> StepCost:
    """Cost of one step on the slowest rank (they are equal here).

    Args:
        quantized: of the decoder's linears.
        plain: of linears that are not in the method's scheme, as is lm_head, in 16 bits.
    """

    def seconds(matrix: Matrix, rows: float) -> float:
        cost = quantized if matrix.quantized else plain
        return matrix.count * cost.seconds(rows, matrix.n, matrix.k, matrix.bits)

    linears = sum(seconds(matrix, batch.tokens) for matrix in shape.dense)
    if shape.expert:
        active = shape.distinct_experts(batch.tokens)
        rows = batch.tokens * shape.experts_per_token / active
        linears += active * sum(seconds(matrix, rows) for matrix in shape.expert)
    lm_head = seconds(shape.lm_head, batch.outputs) if shape.lm_head else 0.0
    engine = machine.engine
    overhead = engine.step_s + shape.layers * engine.layer_s + batch.sequences * engine.request_s
    communication = 0.0
    if shape.ranks > 1:
        overhead += engine.rank_step_s
        communication = _all_reduce(shape, machine, batch.tokens)
    return StepCost(
        linears, lm_head, _attention(shape, machine, batch), _vectors(shape, machine, batch), communication, overhead
    )


def _attention(shape: Shape, machine: Machine, batch: Batch) -> float:
    """The cache is read at a share of the bandwidth; a pair is 4 x head_dim FLOPs in every head (QK^T and PV)."""
    full = shape.full_layers
    nbytes = shape.kv_bytes * (full * batch.cached + shape.sliding_layers * batch.window_cached)
    pairs = full * batch.pairs + shape.sliding_layers * batch.window_pairs
    flops = 4 * shape.heads * shape.head_dim * pairs
    read = nbytes / (machine.bandwidth * machine.attention_bandwidth)
    return read + flops / (machine.flops * machine.attention_flops)


def _vectors(shape: Shape, machine: Machine, batch: Batch) -> float:
    elements = batch.tokens * shape.vector_elements
    if machine.engine.element_s:
        return elements * machine.engine.element_s
    return elements * shape.dtype_bytes / machine.bandwidth


def _all_reduce(shape: Shape, machine: Machine, tokens: float) -> float:
    """Two a layer, of [tokens, hidden]; each rank sends and receives 2 (ranks - 1) / ranks of it."""
    nbytes = tokens * shape.hidden * shape.dtype_bytes * 2 * (shape.ranks - 1) / shape.ranks
    return 2 * shape.layers * (machine.engine.link_s + nbytes / machine.link)
