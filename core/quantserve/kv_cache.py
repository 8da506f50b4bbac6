"""Bytes of KV cache: per token, per sequence, per tensor-parallel rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantserve.architecture import read_architecture

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint
    from quantserve.config import ModelConfig

# Bytes of one stored element; quantized kinds keep a float32 scale per token and head beside it.
_ELEMENT: dict[str, tuple[float, int]] = {
    "float16": (2, 0),
    "bfloat16": (2, 0),
    "fp8": (1, 0),
    "fp8_e4m3": (1, 0),
    "fp8_e5m2": (1, 0),
    "fp8_inc": (1, 0),
    "int8_per_token_head": (1, 4),
    "fp8_per_token_head": (1, 4),
    "int4_per_token_head": (0.5, 4),
}
_SLIDING_FAMILIES = ("mistral", "mixtral", "phi3")


@dataclass(frozen=True, slots=True)
class KvCache:
    """KV cache of one rank.

    Attributes:
        bytes_per_token: over all layers, for a token every layer keeps; 0 when unknown.
        full_layers: layers that keep every token.
        sliding_layers: layers that keep the last ``window`` tokens.
        window: 0 without sliding layers.
        notes: remarks for the reader of an estimate.
    """

    bytes_per_token: int
    full_layers: int = 0
    sliding_layers: int = 0
    window: int = 0
    notes: tuple[str, ...] = ()

    def bytes_of_sequence(self, tokens: int, step: int) -> int:
        """Bytes a sequence of ``tokens`` needs when up to ``step`` tokens are computed at once."""
        layers = self.full_layers + self.sliding_layers
        if not layers:
            return 0
        per_layer = self.bytes_per_token / layers
        kept = min(tokens, self.window + step) if self.window else tokens
        return int(per_layer * (self.full_layers * tokens + self.sliding_layers * kept))


def kv_cache(checkpoint: Checkpoint, model: ModelConfig, ranks: int, dtype_bytes: int) -> KvCache:
    """KV cache of one of ``ranks`` ranks.

    2 (K and V) x layers x kv heads of the rank x head_dim x bytes of an element. Kv heads are split
    over the ranks and repeated when there are more ranks than heads. Multi-head latent attention keeps
    one vector of ``kv_lora_rank + qk_rope_head_dim`` per token and layer on every rank instead.
    """
    asked = model.engine_kwargs.get("kv_cache_dtype")
    kind = asked if isinstance(asked, str) and asked != "auto" else ""
    element, scale = _ELEMENT.get(kind, (dtype_bytes, 0))
    config = checkpoint.text_config
    latent, rope = _size(config.get("kv_lora_rank")), _size(config.get("qk_rope_head_dim"))
    layers = _size(config.get("num_hidden_layers")) or _size(config.get("n_layer"))
    if latent and rope and layers:
        note = f"multi-head latent attention: {latent} + {rope} values per token and layer, on every rank"
        return KvCache(int(layers * (latent + rope) * element), layers, notes=(note,))
    architecture, _ = read_architecture(checkpoint)
    if architecture is not None:
        layers, kv_heads, head_dim = architecture.layers, architecture.kv_heads, architecture.head_dim
    else:
        heads = _size(config.get("num_attention_heads")) or _size(config.get("n_head"))
        kv_heads = _size(config.get("num_key_value_heads")) or heads
        hidden = _size(config.get("hidden_size")) or _size(config.get("n_embd"))
        head_dim = _size(config.get("head_dim")) or (hidden // heads if heads else 0)
    if not (layers and kv_heads and head_dim):
        return KvCache(0, notes=("config.json does not give layers, heads and head size; KV cache not estimated",))
    of_rank = max(1, kv_heads // ranks)
    notes = []
    if kv_heads < ranks:
        notes.append(f"{kv_heads} kv heads on {ranks} ranks: each rank keeps a copy of one")
    if kind and kind not in _ELEMENT:
        notes.append(f"kv_cache_dtype {kind}: counted as {dtype_bytes} bytes an element")
    per_token = int(2 * layers * of_rank * (head_dim * element + scale))
    sliding, window = _sliding(checkpoint, layers)
    if sliding:
        notes.append(f"{sliding} of {layers} layers keep a sliding window of {window} tokens")
    return KvCache(per_token, layers - sliding, sliding, window, tuple(notes))


def _sliding(checkpoint: Checkpoint, layers: int) -> tuple[int, int]:
    """Number of sliding-window layers and their window."""
    config = checkpoint.text_config
    window = _size(config.get("sliding_window"))
    if not window or config.get("use_sliding_window") is False:
        return 0, 0
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return min(layers, sum(kind == "sliding_attention" for kind in kinds)), window
    return (layers, window) if config.get("model_type") in _SLIDING_FAMILIES else (0, 0)


def _size(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 24 else 0
