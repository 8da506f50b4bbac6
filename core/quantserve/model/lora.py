"""Memory of LoRA in vLLM: a slot for each adapter of a batch, as large as the largest rank allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantserve.model.architecture import read_sizes
from quantserve.model.layers import linears
from quantserve.model.linear import Linear, shard_k, shard_n

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint
    from quantserve.config import ModelConfig
    from quantserve.target import Target

SLOTS = 1
"""``max_loras`` of vLLM 0.32 by default."""
RANK = 16
"""``max_lora_rank`` by default."""


def lora_bytes(checkpoint: Checkpoint, model: ModelConfig, target: Target, ranks: int, dtype_bytes: int) -> int:
    """Bytes that LoRA takes on one of ``ranks`` tensor-parallel ranks; 0 without ``enable_lora``.

    vLLM 0.32 allocates A [rank, K] and B [N, rank] for every linear, for the embedding and for the output layer, in
    every slot, whatever the adapters hold. It keeps the loaded adapters in main memory as well, so on a CPU they count
    a second time.
    """
    kwargs = model.engine_kwargs
    if not kwargs.get("enable_lora"):
        return 0
    slots = _number(kwargs.get("max_loras"), SLOTS)
    copies = slots + (_number(kwargs.get("max_cpu_loras"), slots) if target.device == "cpu" else 0)
    rank, sharded = _number(kwargs.get("max_lora_rank"), RANK), bool(kwargs.get("fully_sharded_loras"))
    values = sum(_values(linear, rank, ranks, sharded) for linear in linears(checkpoint))
    if sizes := read_sizes(checkpoint):
        values += 2 * rank * (sizes.vocab + sizes.hidden)  # embedding and output layer, whole on every rank
    return copies * values * (2 if kwargs.get("lora_dtype") in ("float16", "bfloat16") else dtype_bytes)


def _values(linear: Linear, rank: int, ranks: int, sharded: bool) -> int:
    a, b = rank * shard_k(linear, ranks), rank * shard_n(linear, ranks)
    if sharded:
        a, b = (-(-a // ranks), b) if linear.parallel == "column" else (a, -(-b // ranks))
    return (a + b) * max(1, linear.experts)


def _number(value: Any, default: int) -> int:
    return value if type(value) is int and value > 0 else default
