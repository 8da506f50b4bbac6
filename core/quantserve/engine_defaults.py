"""What vLLM 0.32 decides when neither config.json nor the user says: dtype, context length, batch sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantserve.target import GIB, Target

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint
    from quantserve.config import ModelConfig

GPU_MEMORY_UTILIZATION = 0.92
DTYPE_BYTES: Mapping[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4}
_NAMES = {"half": "float16", "float": "float32", "fp16": "float16", "bf16": "bfloat16"}
_SAFETENSORS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float32"}
# These kinds of RoPE scaling leave max_position_embeddings already scaled (vllm.config.model).
_ALREADY_SCALED = ("default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


@dataclass(frozen=True, slots=True)
class ServedDtype:
    """The activation dtype a model will run in.

    Attributes:
        name: ``float16``, ``bfloat16`` or ``float32``; an unknown name stays as it was written.
        source: who decided: ``engine_kwargs.dtype``, ``config.json`` or ``vLLM``.
        stored: dtype config.json or the files give, None when neither does.
    """

    name: str
    source: str
    stored: str | None


def normal_dtype(name: str) -> str:
    """vLLM's long name of a dtype: ``half`` is ``float16``."""
    text = name.strip().lower().removeprefix("torch.")
    return _NAMES.get(text, text)


def served_dtype(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> ServedDtype:
    """The dtype vLLM will run this model in on this target.

    ``auto`` keeps what config.json says, except that float32 becomes the platform's favourite:
    bfloat16, or float16 on GPUs before compute capability 8.0, which have no bfloat16.
    """
    stored = checkpoint.torch_dtype or _dtype_of_tensors(checkpoint)
    asked = model.dtype
    if asked and asked.lower() != "auto":
        return ServedDtype(normal_dtype(asked), "engine_kwargs.dtype", stored)
    old_gpu = target.device == "cuda" and target.capability is not None and target.capability < 80
    favourite = "float16" if old_gpu else "bfloat16"
    if stored not in ("float16", "bfloat16") or (old_gpu and stored == "bfloat16"):
        return ServedDtype(favourite, "vLLM", stored)
    return ServedDtype(stored, "config.json", stored)


def _dtype_of_tensors(checkpoint: Checkpoint) -> str | None:
    present = {tensor.dtype for tensor in checkpoint.tensors.values()} & _SAFETENSORS.keys()
    if not present:
        return None
    # What all can be cast to without loss, as vLLM takes it.
    return _SAFETENSORS[present.pop()] if len(present) == 1 else "float32"


def longest_context(checkpoint: Checkpoint) -> int | None:
    """Tokens the model was made for: ``max_position_embeddings`` with RoPE scaling; None when not given."""
    config = checkpoint.text_config
    keys = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")
    limits = [value for key in keys if (value := _positive(config.get(key)))]
    if not limits:
        return None
    return int(min(limits) * rope_factor(config))


def rope_factor(config: Mapping[str, Any]) -> float:
    """By how much RoPE scaling lengthens the context beyond ``max_position_embeddings``; 1.0 without."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if not isinstance(rope, Mapping):
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        factor = rope.get("factor")
        usable = isinstance(factor, (int, float)) and not isinstance(factor, bool) and 0 < factor <= 1e6
        if kind not in _ALREADY_SCALED and usable:
            return float(factor or 1.0)
    return 1.0


def context_length(checkpoint: Checkpoint, model: ModelConfig) -> int | None:
    """Tokens of prompt and answer the model will be served with; None when nobody says."""
    asked = model.max_model_len
    return asked if asked and asked > 0 else longest_context(checkpoint)


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
