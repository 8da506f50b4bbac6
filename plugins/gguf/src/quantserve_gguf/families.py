"""Families of models in GGUF files: what config.json would say, and the names of tensors in transformers.

Sources: the converter of llama.cpp (convert_hf_to_gguf.py, gguf-py/gguf/tensor_mapping.py), and transformers' own
configs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import pi
from typing import Any, Final

from quantserve_gguf.header import Value

_PLAIN: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA: Final = {
    **_PLAIN,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI: Final = {**_PLAIN, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_TOP: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
NOT_WEIGHTS: Final = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Factors of the rotary embedding, which go into the config."""


@dataclass(frozen=True)
class Family:
    """A family of models that vLLM serves.

    Attributes:
        architecture: vLLM's class.
        model_type: of config.json.
        layer: names of a layer's modules in the file -> in transformers.
        paired: whether rows of q and k are stored in the order of pairs, as llama.cpp rotates the first families.
        norm_offset: what the file's norms have more than transformers'.
        more: further fields of config.json -> keys of the file.
        constant: further fields of config.json.
    """

    architecture: str
    model_type: str
    layer: Mapping[str, str]
    paired: bool = False
    norm_offset: int = 0
    more: Mapping[str, str] = field(default_factory=dict)
    constant: Mapping[str, Any] = field(default_factory=dict)


_SOFTCAPS: Final = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "sliding_window": "attention.sliding_window",
}
FAMILIES: Final = {
    "llama": Family("LlamaForCausalLM", "llama", _PLAIN, paired=True),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", _PLAIN),
    "qwen3": Family("Qwen3ForCausalLM", "qwen3", _PLAIN),
    "phi3": Family("Phi3ForCausalLM", "phi3", _PHI, more={"sliding_window": "attention.sliding_window"}),
    "gemma2": Family(
        "Gemma2ForCausalLM", "gemma2", _GEMMA, norm_offset=1, more=_SOFTCAPS,
        constant={"hidden_activation": "gelu_pytorch_tanh"},
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM", "gemma3_text", _GEMMA, norm_offset=1, more=_SOFTCAPS,
        constant={"hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 10000.0},
    ),
}  # fmt: skip
"""By ``general.architecture``."""


class Unserved(ValueError):
    """A model that cannot be served as the file describes it; the message says what of it."""


def renamed(family: Family, name: str) -> str | None:
    """The name in transformers of a tensor of the file; None where the family has no such tensor."""
    if match := re.fullmatch(r"blk\.(\d{1,6})\.(\w+)\.(weight|bias)", name):
        module = family.layer.get(match[2])
        return f"model.layers.{int(match[1])}.{module}.{match[3]}" if module else None
    module, _, suffix = name.rpartition(".")
    return f"{_TOP[module]}.{suffix}" if module in _TOP and suffix in ("weight", "bias") else None


def config_of(
    metadata: Mapping[str, Value], shapes: Mapping[str, tuple[int, ...]], factors: tuple[float, ...]
) -> dict[str, Any]:
    """What config.json would hold.

    Args:
        metadata: of the file.
        shapes: of the tensors, by their names in the file.
        factors: the values of ``rope_freqs.weight``; empty where there is no such tensor.

    Raises:
        Unserved: the family or a feature of it is not served; the message names it.
    """
    architecture = str(metadata.get("general.architecture", ""))[:80]
    family = FAMILIES.get(architecture)
    if family is None:
        raise Unserved(f"its architecture is {architecture!r}; served are {', '.join(FAMILIES)}")
    if _whole(metadata, f"{architecture}.expert_count", 0):
        raise Unserved(f"it is a mixture of experts ({architecture}), which is served for no GGUF file")
    if "rope_factors_long.weight" in shapes:
        raise Unserved("its rotary embedding has factors for long contexts (rope_factors_long)")

    def whole(key: str, default: int | None = None) -> int:
        return _whole(metadata, f"{architecture}.{key}", default)

    def number(key: str, default: float) -> float:
        return _number(metadata, f"{architecture}.{key}", default)

    hidden, heads = whole("embedding_length"), whole("attention.head_count")
    if not heads:
        raise Unserved(f"{architecture}.attention.head_count is 0")
    embedding = shapes.get("token_embd.weight", ())
    vocabulary = embedding[0] if len(embedding) == 2 else whole("vocab_size")
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": hidden,
        "intermediate_size": whole("feed_forward_length"),
        "num_hidden_layers": whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": whole("attention.head_count_kv", heads),
        "head_dim": whole("attention.key_length", hidden // heads),
        "max_position_embeddings": whole("context_length"),
        "vocab_size": vocabulary,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        **family.constant,
    }
    for key in ("rope.dimension_count", "attention.value_length"):
        if (size := whole(key, config["head_dim"])) != config["head_dim"]:
            raise Unserved(f"{architecture}.{key} is {size}, and a head has {config['head_dim']}")
    for name, key in family.more.items():
        if (full := f"{architecture}.{key}") in metadata:
            config[name] = _number(metadata, full, 0.0)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (token := _whole(metadata, f"tokenizer.ggml.{key}_token_id", -1)) >= 0:
            config[f"{name}_token_id"] = token
    if family.norm_offset:
        config["query_pre_attn_scalar"] = _query_scale(architecture, config)
    if scaling := _scaling(metadata, architecture, config, factors):
        config["rope_scaling"] = scaling
    return config


def _query_scale(architecture: str, config: Mapping[str, Any]) -> int:
    """Of the two Gemma models with 27 billion weights hidden_size / heads, else head_dim, as in llama.cpp."""
    large = config["num_hidden_layers"] == (46 if architecture == "gemma2" else 62)
    return int(config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"])


def _scaling(
    metadata: Mapping[str, Value], architecture: str, config: Mapping[str, Any], factors: tuple[float, ...]
) -> dict[str, Any] | None:
    """``rope_scaling`` of config.json."""
    if factors:
        return _llama3(config, factors)
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if kind in ("none", ""):
        return None
    if kind not in ("linear", "yarn"):
        raise Unserved(f"its rotary embedding is scaled with {str(kind)[:40]!r}")
    factor = _number(metadata, f"{architecture}.rope.scaling.factor", 1.0)
    scaling: dict[str, Any] = {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        original = f"{architecture}.rope.scaling.original_context_length"
        scaling["original_max_position_embeddings"] = _whole(metadata, original)
    return scaling


def _llama3(config: Mapping[str, Any], factors: tuple[float, ...]) -> dict[str, Any]:
    """The scaling of Llama 3.1 to 3.3, from the factors that llama.cpp computed of it, which must come out again."""
    scaling = {
        "rope_type": "llama3", "factor": float(max(factors)), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    if (
        len(factors) * 2 != config["head_dim"]
        or not all(0.99 < one < 1e6 for one in factors)
        or config["rope_theta"] < 1
    ):
        raise Unserved(f"it has {len(factors)} factors of its rotary embedding, such as {factors[0]:g}")
    for index, stored in enumerate(factors):
        length = 2 * pi * config["rope_theta"] ** (2 * index / config["head_dim"])
        turns = 8192 / length
        smooth = min(max((turns - 1.0) / 3.0, 0.0), 1.0)
        expected = 1 / ((1 - smooth) / max(factors) + smooth)
        if abs(stored - expected) > 1e-3 * expected:
            raise Unserved(f"factor {index} of its rotary embedding is {stored:g}, {expected:g} in Llama 3.1")
    return scaling


def _number(metadata: Mapping[str, Value], key: str, default: float) -> float:
    """A finite number as it is in the file, integers as integers."""
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e30:
        raise Unserved(f"{key} is {str(value)[:80]}, where a number is expected")
    return value


def _whole(metadata: Mapping[str, Value], key: str, default: int | None = None) -> int:
    value = metadata.get(key, default)
    if isinstance(value, tuple) and value and len(set(value)) == 1:
        value = value[0]  # one for each layer, all alike
    if value is None:
        raise Unserved(f"it lacks {key}")
    if type(value) is not int or not -1 <= value < 2**31:
        raise Unserved(f"{key} is {str(value)[:80]}, where one integer is expected")
    return value
