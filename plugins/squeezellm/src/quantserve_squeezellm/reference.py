"""What RayLLM published in November 2023 for SqueezeLLM Llama-2, as data.

One row per model and GPU count. The numbers come from vLLM 0.2.2 and are kept for comparison with
those tables; they do not predict today's engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantserve.api import Checkpoint, PerformanceProfile, PublishedRun, Target, published_profile

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

RUNS = (
    PublishedRun(
        "Llama-2-7B SqueezeLLM W4A16", "llama", 4096, 32, 11008, 32000, "a100-80g", 1, 42372, 13857, 109.77, 9.13
    ),
    PublishedRun(
        "Llama-2-13B SqueezeLLM W4A16", "llama", 5120, 40, 13824, 32000, "a100-80g", 1, 64293, 21676, 628.71, 5.6
    ),
)
CONDITIONS = (
    "RayLLM's table: {title}, {gpus} x A100-80G, vLLM 0.2.2, llmperf defaults of 2023: "
    "10 users in rounds, about 500 tokens in, at most 384 out, temperature 0"
)
CAVEATS = (
    "throughput is per user, not of the server; ITL is E2E / output tokens, so it contains TTFT",
    "replies differ in length between methods, so E2E is not like for like",
    "vLLM 0.2.2 of 2023; its SqueezeLLM kernel went through the batch one request after the other",
)


def published(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> PerformanceProfile | None:
    """The published row of this very model, GPU and GPU count; None for everything else."""
    return published_profile(RUNS, checkpoint, model, target, conditions=CONDITIONS, caveats=CAVEATS)
