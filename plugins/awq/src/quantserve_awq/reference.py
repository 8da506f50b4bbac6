"""What RayLLM published in November 2023 for AWQ Llama-2, as data.

One row per model and GPU count. The numbers come from vLLM 0.2.2 and are kept for comparison with
those tables; they do not predict today's engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from quantserve.api import Checkpoint, PerformanceProfile, Target

if TYPE_CHECKING:
    from quantserve.api import ModelConfig


class Row(NamedTuple):
    """One published row: the model it was measured on and the means per request."""

    model: str
    hidden: int
    layers: int
    intermediate: int
    gpus: int
    e2e_ms: float
    ttft_ms: float
    itl_ms: float
    output_tokens_per_s: float


ROWS = (
    Row("Llama-2-7B chat AWQ W4A16", 4096, 32, 11008, 1, 4148, 994, 21.76, 47.09),
    Row("Llama-2-13B chat AWQ W4A16", 5120, 40, 13824, 1, 5626, 1695, 41.35, 24.48),
    Row("Llama-2-70B chat AWQ W4A16", 8192, 80, 28672, 4, 9902, 2174, 69.64, 14.4),
)

CAVEATS = (
    "throughput is per user, not of the server; ITL is E2E / output tokens, so it contains TTFT",
    "replies differ in length between methods, so E2E is not like for like",
    "vLLM 0.2.2 of 2023; it had no Marlin kernels, and nearly all of AWQ's loss there is TTFT",
)


def published(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> PerformanceProfile | None:
    """The published row of this very model, GPU and GPU count; None for everything else."""
    config = checkpoint.text_config
    shape = (config.get("hidden_size"), config.get("num_hidden_layers"), config.get("intermediate_size"))
    for row in ROWS:
        same_model = config.get("model_type") == "llama" and shape == (row.hidden, row.layers, row.intermediate)
        if same_model and config.get("vocab_size") == 32000 and is_a100_80g(target):
            if model.tensor_parallel_size != row.gpus:
                return None
            return PerformanceProfile(
                source="reference",
                conditions=(
                    f"RayLLM's table: {row.model}, {row.gpus} x A100-80G, vLLM 0.2.2, llmperf defaults of 2023: "
                    "10 users in rounds, about 500 tokens in, at most 384 out, temperature 0"
                ),
                e2e_ms=row.e2e_ms,
                ttft_ms=row.ttft_ms,
                itl_ms=row.itl_ms,
                output_tokens_per_s=row.output_tokens_per_s,
                caveats=CAVEATS,
            )
    return None


def is_a100_80g(target: Target) -> bool:
    """Whether the target is the table's GPU, by its known name or by what the driver calls it."""
    return target.device == "cuda" and "a100" in target.name.lower() and target.memory_bytes >= 75 * 2**30
