"""What RayLLM published in November 2023 for unquantized Llama-2, as data.

One row per model and GPU count. The numbers come from vLLM 0.2.2 and are kept for comparison with
those tables; they do not predict today's engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantserve.api import Checkpoint, PerformanceProfile, PublishedRun, Target, published_profile

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

RUNS = (
    PublishedRun("Llama-2-7B chat FP16", "llama", 4096, 32, 11008, 32000, "a100-80g", 1, 3212, 362, 18.81, 53.44),
    PublishedRun("Llama-2-13B chat FP16", "llama", 5120, 40, 13824, 32000, "a100-80g", 1, 4371, 644, 31.06, 32.25),
    PublishedRun("Llama-2-70B chat FP16", "llama", 8192, 80, 28672, 32000, "a100-80g", 4, 8048, 1073, 58.1, 17.26),
)
CONDITIONS = (
    "RayLLM's table: {title}, {gpus} x A100-80G, vLLM 0.2.2, llmperf defaults of 2023: "
    "10 users in rounds, about 500 tokens in, at most 384 out, temperature 0"
)
CAVEATS = (
    "throughput is per user, not of the server; ITL is E2E / output tokens, so it contains TTFT",
    "replies differ in length between methods, so E2E is not like for like",
    "vLLM 0.2.2 of 2023; measure on your own GPU before deciding",
)


def published(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> PerformanceProfile | None:
    """The published row of this very model, GPU and GPU count; None for everything else."""
    return published_profile(RUNS, checkpoint, model, target, conditions=CONDITIONS, caveats=CAVEATS)
