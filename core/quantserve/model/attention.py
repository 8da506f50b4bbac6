"""What each layer of a decoder keeps of a sequence, and the sizes of its heads, as vLLM 0.32 reads config.json.

Sources: ``ModelArchConfigConvertorBase`` (heads), ``get_num_layers_by_block_type`` (hybrids) and ``EngineArgs`` (when
``sliding_window`` holds for every layer) of vLLM; the layer lists of transformers' configuration classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from quantserve.families import MAX_LAYERS, entry, latent_types, layer_list, service
from quantserve.once import once

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint

Kind = Literal["full", "window", "state", "both", "none"]
"""``full`` keeps every token, ``window`` the last ones, ``state`` a block of constant size (Mamba, linear attention,
short convolution), ``both`` every token and a state (Falcon-H1), ``none`` nothing of its own (an MLP, shared KV)."""

_KINDS: Mapping[str, Kind] = {
    "full_attention": "full", "attention": "full", "indexed_attention": "full", "deepseek_sparse_attention": "full",
    "qwen_sparse_attention": "full", "global_attention": "full", "sliding_attention": "window",
    "local_attention": "window", "linear_attention": "state", "mamba": "state", "mamba2": "state", "conv": "state",
    "recurrent": "state", "short_conv": "state", "hybrid": "both", "mlp": "none", "moe": "none", "dense": "none",
    "chunked_attention": "window",
}  # fmt: skip
_PATTERN: Mapping[str, Kind] = {"*": "full", "M": "state", "-": "none", "E": "none"}
# Families whose layers differ in head size or keep compressed tokens: vLLM's numbers do not follow from these fields.
_UNKNOWN = ("deepseek_v4", "deepseek_v41", "mimo_v2", "mimo_v2_flash", "step3p5", "inkling_text", "zaya", "hy_v4")


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads of the attention layers.

    Attributes:
        query: query heads.
        kv: key/value heads; 1 where all queries share one.
        size: elements of a head.
        latent: elements of the one vector a token has in multi-head latent attention; 0 elsewhere.
        index: bytes of a token in the cache of a sparse attention's indexer; 0 without.
        full_kv, full_size: ``kv`` and ``size`` of the ``full`` layers where they differ from the others; else 0.
    """

    query: int
    kv: int
    size: int
    latent: int = 0
    index: int = 0
    full_kv: int = 0
    full_size: int = 0


def size_of(config: Mapping[str, Any], *keys: str) -> int:
    """The first of these fields that is a positive integer; 0 when none is."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 24:
            return value
    return 0


def layer_count(config: Mapping[str, Any]) -> int:
    """Layers of a completed config; 0 when unknown."""
    layers = size_of(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    pattern = config.get("hybrid_override_pattern")
    if not layers and isinstance(pattern, str):
        layers = len(pattern)
    return min(layers, MAX_LAYERS)


@once
def read_heads(checkpoint: Checkpoint) -> Heads | None:
    """Heads of a model of any family; None when config.json does not give them."""
    config = checkpoint.text_config
    kind = config.get("model_type")
    query = size_of(config, "num_attention_heads", "n_head", "n_heads", "num_heads")
    hidden = size_of(config, "hidden_size", "n_embd", "d_model")
    rank, rope = size_of(config, "kv_lora_rank"), size_of(config, "qk_rope_head_dim")
    plain = size_of(config, "qk_nope_head_dim")
    if not query:
        return None
    by_transformers = service(architectures(checkpoint))[0] == "transformers"
    if rank and (str(kind) in latent_types() or by_transformers) and config.get("is_causal") is not False:
        indexer = size_of(config, "index_head_dim") if size_of(config, "index_topk") else 0
        # The indexer keeps float8 values and a float32 scale for each 128 of them.
        return Heads(query, 1, rank + rope, rank + rope, indexer + 4 * -(-indexer // 128))
    if rank and plain and rope:
        return Heads(query, query, plain + rope)  # vLLM expands the latent vector: MiniCPM3
    kv = _kv_heads(config, query)
    size = size_of(config, "head_dim", "hidden_size_per_head", "kv_channels")
    if kind in ("zamba", "zamba2"):  # attention works on the hidden state beside the embedding
        size = size_of(config, "attention_head_dim") or 2 * hidden // query
    if not (hidden or size):
        return None
    wide = size_of(config, "global_head_dim")
    few = size_of(config, "num_global_key_value_heads") if config.get("attention_k_eq_v") is True else 0
    return Heads(query, kv, size or hidden // query, full_kv=few, full_size=wide)


def _kv_heads(config: Mapping[str, Any], query: int) -> int:
    kind, attention = config.get("model_type"), config.get("attn_config")
    if config.get("multi_query") is True:
        old_falcon = kind in ("falcon", "RefinedWeb", "RefinedWebModel") and not config.get("new_decoder_architecture")
        if old_falcon or (kind == "gpt_bigcode" and not size_of(config, "num_key_value_heads")):
            return 1
    if kind == "dbrx":
        return (size_of(attention, "kv_n_heads") if isinstance(attention, Mapping) else 0) or 1
    names = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups")
    return size_of(config, *names) or query


def architectures(checkpoint: Checkpoint) -> list[str]:
    """The strings under ``architectures`` of config.json; without any, the class vLLM then takes for the model type."""
    given = checkpoint.config.get("architectures")
    names = [name for name in given if isinstance(name, str)] if isinstance(given, (list, tuple)) else []
    usual = (entry(checkpoint.config.get("model_type")) or {}).get("architecture")
    return names or ([usual] if isinstance(usual, str) else [])


def is_encoder(checkpoint: Checkpoint) -> bool:
    """Whether the model only encodes (BERT and its like), so that it keeps no KV cache."""
    config = checkpoint.text_config
    bert = "type_vocab_size" in config or config.get("model_type") in ("modernbert", "nomic_bert", "new", "gte")
    both_ways = config.get("is_causal") is False or config.get("use_bidirectional_attention") is True
    return (bert or both_ways) and config.get("is_decoder") is not True


@once
def attention_layers(checkpoint: Checkpoint) -> tuple[Kind, ...] | None:
    """What each layer keeps, in order; None when neither config.json nor its family tells for sure."""
    config = checkpoint.text_config
    layers = layer_count(config)
    if not layers or config.get("model_type") in _UNKNOWN or config.get("is_encoder_decoder") is True:
        return None
    kinds = _kinds(config, layers)
    if kinds is None:
        return None
    return tuple("none" if shared else kind for kind, shared in zip(kinds, _shared(config, layers), strict=True))


def _kinds(config: Mapping[str, Any], layers: int) -> Sequence[Kind] | None:
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        found = [_PATTERN.get(letter) for letter in pattern]
        return None if None in found or len(found) != layers else [kind for kind in found if kind]
    if isinstance(config.get("block_configs"), list) or config.get("per_layer_config"):
        return None  # each layer has heads of its own
    for key in ("layers_block_type", "layer_types"):
        given = config.get(key)
        if isinstance(given, list) and given:
            return _named(given[:layers], config, layers)
    if indices := _full_indices(config, layers):
        return ["full" if index in indices else "state" for index in range(layers)]
    repeated = config.get("block_types")  # RecurrentGemma
    if isinstance(repeated, list) and repeated:
        return _named([repeated[index % len(repeated)] for index in range(layers)], config, layers)
    types = config.get("attn_type_list")
    if isinstance(types, list) and len(types) >= layers:
        return ["full" if kind == 1 else "state" for kind in types[:layers]]
    period, offset = size_of(config, "attn_layer_period"), config.get("attn_layer_offset", 0)
    if period and isinstance(offset, int):
        return ["full" if index % period == offset else "state" for index in range(layers)]
    filled = layer_list(config, "layer_types", layers)
    if filled is not None:
        return _named(filled, config, layers)
    if _fills_unknown_list(config):
        return None
    # vLLM applies sliding_window to every layer where the config has no list of kinds.
    return ["window" if size_of(config, "sliding_window") else "full"] * layers


def _named(names: Sequence[object], config: Mapping[str, Any], layers: int) -> Sequence[Kind] | None:
    found = [_KINDS.get(name) if isinstance(name, str) else None for name in names]
    if None in found or len(found) != layers:
        return None
    window = window_of(config)
    return ["full" if kind == "window" and not window else kind for kind in found if kind]


def _full_indices(config: Mapping[str, Any], layers: int) -> frozenset[int]:
    """Indices of the attention layers, where a hybrid lists them."""
    linear = config.get("linear_attn_config")
    if isinstance(linear, Mapping) and isinstance(listed := linear.get("full_attn_layers"), list):
        return frozenset(index - 1 for index in listed if isinstance(index, int))  # Kimi-Linear counts from 1
    for key in ("attn_layer_indices", "full_attn_idxs"):
        listed = config.get(key)
        if isinstance(listed, list):
            return frozenset(index for index in listed if isinstance(index, int) and 0 <= index < layers)
    return frozenset()


def _fills_unknown_list(config: Mapping[str, Any]) -> bool:
    """Whether the configuration class fills ``layer_types`` by a rule that is not known."""
    from quantserve.families import entry

    known = entry(config.get("model_type"))
    return bool(known and "unknown" in known.get("layer_types", {}))


def _shared(config: Mapping[str, Any], layers: int) -> list[bool]:
    """Layers that read the KV cache of an earlier one (Gemma 3n, cross-layer attention)."""
    last = size_of(config, "num_kv_shared_layers")
    step = size_of(config, "cla_share_factor") if config.get("use_cla") is True else 1
    return [index >= layers - last or (step > 1 and index % step != 0) for index in range(layers)]


def window_of(config: Mapping[str, Any]) -> int:
    """Tokens a ``window`` layer keeps; 0 without such layers."""
    return size_of(config, "sliding_window", "attention_chunk_size", "local_attention")


def mamba_heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """Heads of a Mamba 2 layer and groups of them that share a state projection; (0, 1) without."""
    heads = size_of(config, "mamba_n_heads", "mamba_num_heads", "n_mamba_heads")
    if not heads and config.get("model_type") == "mamba2":
        heads = size_of(config, "num_heads")
    return heads, size_of(config, "mamba_n_groups", "n_groups", "mamba_ngroups") or 1


def state_bytes(config: Mapping[str, Any], ranks: int, dtype_bytes: int) -> int | None:
    """Bytes of one layer's state on one rank; None when the fields do not tell.

    The four forms of vLLM's ``MambaStateShapeCalculator``: gated delta net, Mamba 2, Mamba 1, short convolution.
    """
    wide = 4 if config.get("mamba_ssm_dtype") == "float32" else dtype_bytes
    if heads := size_of(config, "linear_num_value_heads"):
        key, value = size_of(config, "linear_key_head_dim"), size_of(config, "linear_value_head_dim")
        channels = 2 * key * size_of(config, "linear_num_key_heads") + value * heads
        kernel = size_of(config, "linear_conv_kernel_dim")
        return (channels * (kernel - 1) * dtype_bytes + heads * value * key * wide) // ranks
    if length := size_of(config, "conv_L_cache"):
        return size_of(config, "hidden_size", "conv_dim") * (length - 1) * dtype_bytes // ranks
    linear = config.get("linear_attn_config")
    if isinstance(linear, Mapping) and (heads := size_of(linear, "num_heads")):
        size = size_of(linear, "head_dim")
        kernel = size_of(linear, "short_conv_kernel_size") or 4
        return (3 * heads * size * (kernel - 1) * dtype_bytes + heads * size * size * 4) // ranks
    state = size_of(config, "mamba_d_state", "ssm_state_size", "state_size")
    kernel = size_of(config, "mamba_d_conv", "conv_kernel", "d_conv")
    hidden = size_of(config, "hidden_size", "d_model")
    if not state or not kernel or not hidden:
        return None
    expand = config.get("mamba_expand", config.get("expand", 2))
    heads, groups = mamba_heads(config)
    size = size_of(config, "mamba_d_head", "mamba_head_dim", "mamba_headdim")
    inner = size_of(config, "mamba_d_ssm", "intermediate_size") if config.get("mamba_d_ssm") else heads * size
    inner = inner or int(hidden * (expand if isinstance(expand, (int, float)) else 2))
    if heads > 1:
        channels = inner + 2 * max(groups, ranks) * state
        return (channels * (kernel - 1) * dtype_bytes + inner * state * wide) // ranks
    return (inner * (kernel - 1) * dtype_bytes + inner * state * dtype_bytes) // ranks
