"""The context length vLLM 0.32 serves a model with, and the longest it accepts.

Follows ``derive_max_model_len_and_key`` and ``_get_and_verify_max_len`` of vLLM; a test holds it against both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantserve.model.attention import is_encoder

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint
    from quantserve.config import ModelConfig

DEFAULT = 2048
"""Tokens vLLM assumes where config.json gives no length."""
_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
# With these kinds of RoPE scaling max_position_embeddings is the scaled length already.
_SCALED = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


@dataclass(frozen=True, slots=True)
class ContextLimit:
    """How long a sequence may be.

    Attributes:
        default: tokens the engine serves when the user names no length.
        longest: largest length vLLM accepts without VLLM_ALLOW_LONG_MAX_MODEL_LEN; None when it accepts any.
        key: the field of config.json the longest comes from, "" where there is none.
        factor: RoPE scaling factor in ``longest``; 1.0 without.
    """

    default: int
    longest: int | None
    key: str
    factor: float = 1.0


def context_limit(checkpoint: Checkpoint, model: ModelConfig | None = None) -> ContextLimit:
    """The lengths of a model.

    Args:
        model: its config, of which ``disable_sliding_window`` counts.
    """
    config = checkpoint.text_config
    lengths = {key: value for key in _KEYS if (value := _positive(config.get(key)))}
    if language := _mapping(config.get("language_config")):
        lengths = {"max_position_embeddings": n} if (n := _positive(language.get(_KEYS[0]))) else lengths
    given = _positive(config.get("model_max_length"))
    key = "model_max_length" if given else min(lengths, key=lambda name: lengths[name]) if lengths else ""
    longest: float = lengths.get(key, DEFAULT)
    window = config.get("sliding_window")
    disabled = bool(model and model.engine_kwargs.get("disable_sliding_window"))
    if disabled and _positive(window) and _positive(window) < longest:
        key, longest = "sliding_window", _positive(window)
    sections = list(rope_sections(config))
    factor = 1.0 if "gemma3" in str(config.get("model_type")) else _factor(sections)
    # Poolers with absolute positions are limited by their tokenizer as well.
    tokens = _positive(checkpoint.tokenizer.get("model_max_length"))
    if is_encoder(checkpoint) and config.get("position_embedding_type") == "absolute" and 0 < tokens < longest:
        key, longest = "model_max_length of tokenizer_config.json", tokens
    longest *= factor
    encoder = _positive(checkpoint.tokenizer.get("max_seq_length"))
    if encoder:
        key, longest = "max_seq_length", encoder
    default = longest
    if any(_kind(section) == "longrope" for section in sections):
        default = _positive(config.get("original_max_position_embeddings")) or longest
    return ContextLimit(int(default), max(int(longest), given) if key else None, key, factor)


def context_length(checkpoint: Checkpoint, model: ModelConfig) -> int | None:
    """Tokens of prompt and answer the model will be served with."""
    asked = model.max_model_len
    if asked and asked > 0:
        return asked
    return context_limit(checkpoint, model).default if checkpoint.text_config else None


def rope_sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """RoPE parameters, one mapping per kind of layer where they are nested."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if not isinstance(rope, Mapping) or not rope:
            continue
        nested = [
            value for name, value in rope.items() if str(name).endswith("attention") and isinstance(value, Mapping)
        ]
        yield from nested or [rope]
        return


def _kind(rope: Mapping[str, Any]) -> str:
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    return "longrope" if kind == "su" else kind


def _factor(sections: list[Mapping[str, Any]]) -> float:
    factor: object = 1.0
    for section in sections:
        if _kind(section) not in _SCALED:
            factor = section.get("factor", factor)
    usable = isinstance(factor, (int, float)) and not isinstance(factor, bool) and 0 < factor <= 1e6
    return float(factor) if usable else 1.0  # type: ignore[arg-type]


def _mapping(value: object) -> Mapping[str, Any] | None:
    return value if isinstance(value, Mapping) else None


def _positive(value: object) -> int:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1 << 40
    return int(value) if usable else 0  # type: ignore[call-overload]
