"""Mistral's own format: params.json, consolidated*.safetensors and tekken.json, read as vLLM 0.32 adapts them.

vLLM prefers this format where params.json and consolidated files are there. Config and tensor names are translated to
those of transformers here, so that the same checks hold for both formats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

PARAMS: Final = "params.json"
DEFAULT_LENGTH: Final = 128_000
_FIELDS: Final = {
    "dim": "hidden_size", "norm_eps": "rms_norm_eps", "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "hidden_dim": "intermediate_size",
}  # fmt: skip
_MOE_FIELDS: Final = {
    "route_every_n": "moe_layer_freq", "first_k_dense_replace": "first_k_dense_replace",
    "num_experts_per_tok": "num_experts_per_tok", "num_experts": "n_routed_experts",
    "expert_hidden_dim": "moe_intermediate_size", "num_shared_experts": "n_shared_experts",
}  # fmt: skip
_TOP: Final = {"tok_embeddings": "model.embed_tokens", "output": "lm_head", "norm": "model.norm"}
_PARTS: Final = {
    "attention": "self_attn", "feed_forward": "mlp", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj", "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "qscale_weight": "weight_scale", "qscale_act": "input_scale",
}  # fmt: skip
_LAYER: Final = re.compile(r"layers\.(\d+)\.(.+)")


def is_mistral_format(files: Mapping[str, int]) -> bool:
    """Whether vLLM, left to itself, loads Mistral's format from these files."""
    consolidated = any(name.startswith("consolidated") and name.endswith(".safetensors") for name in files)
    return consolidated and PARAMS in files


def adapted(params: Mapping[str, Any]) -> dict[str, Any]:
    """params.json as a config.json; a vision or audio encoder makes it a multimodal one with a ``text_config``."""
    made = {_FIELDS.get(key, key): value for key, value in params.items()}
    made.setdefault("max_position_embeddings", made.get("max_seq_len", DEFAULT_LENGTH))
    made["max_seq_len"] = made.get("max_seq_len", made["max_position_embeddings"])
    made["tie_word_embeddings"] = made.pop("tied_embeddings", False)
    window = made.setdefault("sliding_window", None)
    layers = made.get("num_hidden_layers")
    if isinstance(window, list) and window and isinstance(layers, int) and 0 < layers <= 1024:
        made["layer_types"] = [
            "sliding_attention" if window[index % len(window)] else "full_attention" for index in range(layers)
        ]
        made["sliding_window"] = next((size for size in window if size), None)
    moe = made.get("moe")
    if isinstance(made.get("yarn"), Mapping):
        made["rope_parameters"] = {"rope_type": "yarn", **made["yarn"]}
    made |= _kind(made, moe if isinstance(moe, Mapping) else {})
    if isinstance(quantization := made.pop("quantization", None), Mapping):
        method = "fp8" if quantization.get("qformat_weight") == "fp8_e4m3" else quantization.get("quant_method")
        made["quantization_config"] = {**quantization, "quant_method": method or "unknown"}
    multimodal = made.pop("multimodal", None)
    parts = multimodal if isinstance(multimodal, Mapping) else {}
    if made.get("vision_encoder") or parts.get("vision_encoder_args"):
        return _wrapped(made, "pixtral", "PixtralForConditionalGeneration")
    if parts.get("whisper_model_args"):
        return _wrapped(made, "voxtral", "VoxtralForConditionalGeneration")
    return made


def _kind(config: Mapping[str, Any], moe: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("model_type") == "mamba":
        return {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"]}
    if moe.get("num_shared_experts") or config.get("qk_nope_head_dim"):
        renamed = {new: moe[old] for old, new in _MOE_FIELDS.items() if old in moe}
        return {"model_type": "deepseek_v3", "architectures": ["MistralLarge3ForCausalLM"], **renamed}
    if moe:
        experts = {"num_local_experts": moe.get("num_experts"), "num_experts_per_tok": moe.get("num_experts_per_tok")}
        return {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **experts}
    return {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}


def _wrapped(text: dict[str, Any], model_type: str, architecture: str) -> dict[str, Any]:
    outer = {"model_type": model_type, "architectures": [architecture], "text_config": text}
    if "quantization_config" in text:
        outer["quantization_config"] = text["quantization_config"]
    return outer


def translated(name: str) -> str:
    """A tensor's name in transformers' style; names outside the decoder stay as they are."""
    module, _, suffix = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{suffix}"
    found = _LAYER.fullmatch(name)
    if not found:
        return name
    parts = found[2].split(".")
    if "experts" in parts or parts[:2] == ["feed_forward", "gate"]:  # Mixtral keeps w1, w2 and w3
        parts[0] = "block_sparse_moe" if parts[0] == "feed_forward" else parts[0]
        return f"model.layers.{found[1]}.{'.'.join(parts)}"
    return f"model.layers.{found[1]}.{'.'.join(_PARTS.get(part, part) for part in parts)}"
