"""The batch sizes vLLM 0.32 chooses when the user names none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantserve.target import GIB, Target

if TYPE_CHECKING:
    from quantserve.config import ModelConfig

GPU_MEMORY_UTILIZATION = 0.92


def max_num_seqs(model: ModelConfig, target: Target) -> int:
    """Sequences the scheduler runs at once."""
    ranks = model.tensor_parallel_size
    large = target.memory_bytes >= 70 * GIB and "a100" not in target.name.lower()
    default = 128 * ranks if target.device == "cpu" else 1024 if large else 256
    return _positive(model.engine_kwargs.get("max_num_seqs")) or default


def max_num_batched_tokens(model: ModelConfig, target: Target) -> int:
    """Tokens the scheduler puts into one step."""
    large = target.memory_bytes >= 70 * GIB and "a100" not in target.name.lower()
    default = 8192 if large else 2048
    if target.device == "cpu":
        default = 2048 * model.tensor_parallel_size
    elif target.memory_bytes >= 160 * GIB:
        default = 16384
    return _positive(model.engine_kwargs.get("max_num_batched_tokens")) or default


def _positive(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 40 else 0
