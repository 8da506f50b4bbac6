"""Bytes of KV cache: per token, per sequence, per tensor-parallel rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantserve.model.attention import attention_layers, is_encoder, read_heads, size_of, state_bytes, window_of

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


@dataclass(frozen=True, slots=True)
class KvCache:
    """KV cache of one rank.

    Attributes:
        full_bytes: of one token over all layers that keep every token.
        window_bytes: of one token over all layers that keep the last ``window`` tokens.
        full_layers, sliding_layers: how many layers these are.
        window: 0 without sliding layers.
        state_bytes: of a sequence, whatever its length, over all layers with a state.
        known: whether the numbers follow from config.json; when not, nothing is estimated.
        notes: remarks for the reader of an estimate.
    """

    full_bytes: int = 0
    window_bytes: int = 0
    full_layers: int = 0
    sliding_layers: int = 0
    window: int = 0
    state_bytes: int = 0
    known: bool = True
    notes: tuple[str, ...] = ()

    @property
    def bytes_per_token(self) -> int:
        """Of a token that every layer keeps; 0 when unknown or nothing is kept."""
        return self.full_bytes + self.window_bytes

    def bytes_of_sequence(self, tokens: int, step: int) -> int:
        """Bytes a sequence of ``tokens`` needs when up to ``step`` tokens are computed at once."""
        kept = min(tokens, self.window + step) if self.window else tokens
        return self.full_bytes * tokens + self.window_bytes * kept + self.state_bytes


def kv_cache(checkpoint: Checkpoint, model: ModelConfig, ranks: int, dtype_bytes: int) -> KvCache:
    """KV cache of one of ``ranks`` ranks.

    2 (K and V) x kv heads of the rank x head_dim x bytes of an element, in every layer that attends. Kv heads are split
    over the ranks and repeated when there are more ranks than heads. Multi-head latent attention keeps one vector of
    ``kv_lora_rank + qk_rope_head_dim`` per token and layer on every rank instead.
    """
    asked = model.engine_kwargs.get("kv_cache_dtype")
    kind = asked if isinstance(asked, str) and asked != "auto" else ""
    element, scale = _ELEMENT.get(kind, (dtype_bytes, 0))
    if is_encoder(checkpoint):
        return KvCache(notes=("an encoder: no KV cache",))
    if checkpoint.text_config.get("is_encoder_decoder") is True:
        return _encoder_decoder(checkpoint.text_config, ranks, element)
    layers, heads, config = attention_layers(checkpoint), read_heads(checkpoint), checkpoint.text_config
    attends = layers is None or any(kind in ("full", "window", "both") for kind in layers)
    if layers is None or (heads is None and attends):
        why = "which tokens each layer keeps" if heads else "heads and head size"
        return KvCache(known=False, notes=(f"KV cache not estimated: config.json does not tell {why}",))
    notes = []
    full, sliding = layers.count("full") + layers.count("both"), layers.count("window")
    of_full = of_window = 0.0
    if heads is not None and heads.latent:
        notes.append(f"multi-head latent attention: {heads.latent} values per token and layer, on every rank")
        of_full = of_window = heads.latent * element + heads.index
    elif heads is not None and attends:
        if heads.kv < ranks:
            notes.append(f"{heads.kv} kv heads on {ranks} ranks: each rank keeps a copy of one")
        of_window = 2 * max(1, heads.kv // ranks) * (heads.size * element + scale)
        of_full = 2 * max(1, (heads.full_kv or heads.kv) // ranks) * ((heads.full_size or heads.size) * element + scale)
    if kind and kind not in _ELEMENT:
        notes.append(f"kv_cache_dtype {kind}: counted as {dtype_bytes} bytes an element")
    window = window_of(config) if sliding else 0
    if sliding:
        notes.append(f"{sliding} of {len(layers)} layers keep a sliding window of {window} tokens")
    if shared := layers.count("none"):
        notes.append(f"{shared} of {len(layers)} layers keep no KV cache of their own")
    states = layers.count("state") + layers.count("both")
    state = state_bytes(config, ranks, dtype_bytes) if states else 0
    if states:
        counted = "" if state is not None else ", which is not counted"
        notes.append(f"{states} of {len(layers)} layers keep a state of constant size{counted}")
    return KvCache(
        int(full * of_full), int(sliding * of_window), full, sliding, window, states * (state or 0), notes=tuple(notes)
    )


def _encoder_decoder(config: Mapping[str, Any], ranks: int, element: float) -> KvCache:
    """Whisper: each decoder layer keeps its own tokens, and those of the encoder once a sequence."""
    layers, heads = size_of(config, "decoder_layers"), size_of(config, "decoder_attention_heads")
    width, source = size_of(config, "d_model"), size_of(config, "max_source_positions")
    if not (layers and heads and width and source):
        return KvCache(known=False, notes=("KV cache not estimated: config.json does not tell the decoder's size",))
    per_token = int(2 * layers * max(1, heads // ranks) * (width // heads) * element)
    note = f"{source} encoder positions a sequence are kept as well"
    return KvCache(per_token, full_layers=layers, state_bytes=per_token * source, notes=(note,))
