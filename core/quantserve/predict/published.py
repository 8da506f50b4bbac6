"""Expected performance from a published table: the row of this very model, GPU and number of GPUs, or nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantserve.method import PerformanceProfile
from quantserve.target import Target, is_named

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint
    from quantserve.config import ModelConfig


@dataclass(frozen=True, slots=True)
class PublishedRun:
    """One row of a published table: what was measured, on what, and the means per request.

    Attributes:
        title: the row's own name, ``Llama-2-7B chat AWQ W4A16``.
        model_type, hidden_size, num_hidden_layers, intermediate_size, vocab_size: as in config.json; a
            checkpoint is this model when all of them agree.
        gpu: a name of the target table, ``a100-80g``.
        gpus: how many of them, which was also the tensor parallel size.
        e2e_ms, ttft_ms, itl_ms, output_tokens_per_s: as in `PerformanceProfile`.
    """

    title: str
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    vocab_size: int
    gpu: str
    gpus: int
    e2e_ms: float
    ttft_ms: float
    itl_ms: float
    output_tokens_per_s: float

    def is_of(self, checkpoint: Checkpoint, model: ModelConfig, target: Target) -> bool:
        """Whether this row was measured on this model, GPU and number of GPUs."""
        keys = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
        same_model = all(checkpoint.text_config.get(key) == getattr(self, key) for key in keys)
        return same_model and model.tensor_parallel_size == self.gpus and is_named(target, self.gpu)


_RAYLLM = (
    "RayLLM's table: {title}, {gpus} x A100-80G, vLLM 0.2.2, llmperf defaults of 2023: "
    "10 users in rounds, about 500 tokens in, at most 384 out, temperature 0"
)
_CAVEATS = (
    "throughput is per user, not of the server; ITL is E2E / output tokens, so it contains TTFT",
    "replies differ in length between methods, so E2E is not like for like",
)


def rayllm_profile(
    runs: Iterable[PublishedRun], checkpoint: Checkpoint, model: ModelConfig, target: Target, *, caveat: str
) -> PerformanceProfile | None:
    """The profile of the row of RayLLM's table of November 2023 that was measured on exactly this; None otherwise.

    The numbers come from vLLM 0.2.2 and are kept for comparison with that table; they do not predict today's engine.

    Args:
        runs: the method's rows, one per model and number of GPUs.
        caveat: what a reader must know of the method's kernel of 2023.
    """
    caveats = (*_CAVEATS, f"vLLM 0.2.2 of 2023; {caveat}")
    return published_profile(runs, checkpoint, model, target, conditions=_RAYLLM, caveats=caveats)


def published_profile(
    runs: Iterable[PublishedRun],
    checkpoint: Checkpoint,
    model: ModelConfig,
    target: Target,
    *,
    conditions: str,
    caveats: tuple[str, ...] = (),
) -> PerformanceProfile | None:
    """The profile of the run that was made of exactly this; None for everything else.

    Args:
        runs: the table.
        conditions: where it was published, engine version and workload; ``{title}``, ``{gpus}`` and ``{gpu}`` are
            filled in from the row.
        caveats: what a reader must know before comparing.
    """
    run = next((run for run in runs if run.is_of(checkpoint, model, target)), None)
    if run is None:
        return None
    return PerformanceProfile(
        source="reference",
        conditions=conditions.format(title=run.title, gpus=run.gpus, gpu=run.gpu),
        e2e_ms=run.e2e_ms,
        ttft_ms=run.ttft_ms,
        itl_ms=run.itl_ms,
        output_tokens_per_s=run.output_tokens_per_s,
        caveats=caveats,
    )
