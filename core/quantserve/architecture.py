"""The shape of a decoder, read from config.json: how many layers, how wide, with which biases.

Only families whose tensor names follow Llama's are known; everything else is None and is checked from
what the file holds. Every number is bounded, so a hostile config.json costs findings, not time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantserve.finding import Finding

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Family:
    """What a model family does when config.json is silent (its configuration class's defaults)."""

    qkv_bias: bool | None = None  # None: as config.json says in attention_bias
    mlp_bias: bool = False  # whether the family reads mlp_bias
    qk_norm: bool = False
    fused: bool = False  # qkv_proj and gate_up_proj are one tensor each in the file
    kv_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    tied: bool = False
    block_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    experts: tuple[str, int, str] | None = None  # config key, its default, name of the block's expert module
    expert_width: str = "intermediate_size"
    expert_linears: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


_GEMMA2_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(mlp_bias=True),
    "granite": Family(mlp_bias=True),
    "smollm3": Family(mlp_bias=True, kv_heads=4, tied=True),
    "mistral": Family(kv_heads=8),
    "qwen2": Family(qkv_bias=True, kv_heads=32),
    "qwen3": Family(qk_norm=True, kv_heads=32, head_dim=128),
    "qwen3_moe": Family(
        qk_norm=True, kv_heads=4, experts=("num_experts", 128, "mlp"), expert_width="moe_intermediate_size"
    ),
    "mixtral": Family(
        kv_heads=8, experts=("num_local_experts", 8, "block_sparse_moe"), expert_linears=("w1", "w3", "w2")
    ),
    "phi3": Family(fused=True),
    "gemma": Family(kv_heads=16, head_dim=256, tied=True),
    "gemma2": Family(kv_heads=4, head_dim=256, tied=True, block_norms=_GEMMA2_NORMS),
}

_BY_CLASS: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "LlamaModel": "llama",
    "LLaMAForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MistralModel": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Phi3ForCausalLM": "phi3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "GraniteForCausalLM": "granite",
    "SmolLM3ForCausalLM": "smollm3",
}

# Far above any published model; a number beyond them is a broken file, and loops stay short.
LIMITS: Mapping[str, int] = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "moe_intermediate_size": 1 << 24,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 24,
    "num_local_experts": 1024,
    "num_experts": 1024,
    "max_position_embeddings": 1 << 40,
}
MAX_EXPERTS_OF_A_MODEL = 50_000


@dataclass(frozen=True, slots=True)
class Architecture:
    """The numbers that fix every tensor shape of a decoder.

    ``layers`` blocks of ``hidden`` features, ``heads`` query and ``kv_heads`` key/value heads of
    ``head_dim``, an MLP of ``intermediate`` features (``experts`` times in the layers of
    ``expert_layers``), ``vocab`` embedding rows.
    """

    model_type: str
    family: Family
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    experts: int = 0
    expert_width: int = 0
    expert_layers: frozenset[int] = frozenset()
    generates: bool = True  # has an lm_head: not a bare encoder or embedding model


def model_type(checkpoint: Checkpoint) -> str:
    """The family name in config.json: ``text_config.model_type``, ``model_type`` or from ``architectures``."""
    text = checkpoint.text_config
    for value in (text.get("model_type"), checkpoint.config.get("model_type")):
        if isinstance(value, str) and value:
            return value
    return next((_BY_CLASS[name] for name in class_names(checkpoint) if name in _BY_CLASS), "")


def class_names(checkpoint: Checkpoint) -> list[str]:
    """The strings under ``architectures`` of config.json."""
    names = checkpoint.config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, (list, tuple)) else []


def read_architecture(checkpoint: Checkpoint) -> tuple[Architecture | None, list[Finding]]:
    """Read config.json's numbers.

    Returns the architecture, or None when the family is unknown or a number is unusable, and one
    finding per unusable or missing field.
    """
    kind = model_type(checkpoint)
    family = FAMILIES.get(kind)
    reader = _Reader(checkpoint.text_config)
    layers = reader.integer("num_hidden_layers")
    hidden = reader.integer("hidden_size")
    heads = reader.integer("num_attention_heads")
    vocab = reader.integer("vocab_size")
    if family is None:
        # Other families use other names (n_layer, d_model); their absence says nothing.
        return None, [finding for finding in reader.findings if finding.code == "config-bad-field"]
    experts = layers_with_experts = expert_width = 0
    if family.experts is not None:
        experts = reader.integer(family.experts[0], family.experts[1])
        expert_width = reader.integer(family.expert_width)
        layers_with_experts = layers
    intermediate = reader.integer("intermediate_size")
    kv_heads = reader.integer("num_key_value_heads", family.kv_heads or heads)
    given_dim = reader.integer("head_dim", family.head_dim or 0)
    tied = reader.boolean("tie_word_embeddings", family.tied)
    attention_bias = reader.boolean("attention_bias", reader.boolean("bias", False))
    mlp_bias = reader.boolean("mlp_bias", False) and family.mlp_bias
    if reader.findings:
        return None, reader.findings
    if not given_dim and hidden % heads:
        reader.bad(
            "hidden_size", f"{hidden} is not divisible by num_attention_heads {heads}, and head_dim is not given"
        )
    if heads % kv_heads:
        reader.bad("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    if layers_with_experts * experts > MAX_EXPERTS_OF_A_MODEL:
        reader.bad(family.experts[0] if family.experts else "experts", f"{experts} in each of {layers} layers")
    if reader.findings:
        return None, reader.findings
    names = class_names(checkpoint)
    return (
        Architecture(
            model_type=kind,
            family=family,
            layers=layers,
            hidden=hidden,
            intermediate=intermediate,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=given_dim or hidden // heads,
            vocab=vocab,
            tied=tied,
            qkv_bias=family.qkv_bias if family.qkv_bias is not None else reader.boolean("qkv_bias", attention_bias),
            o_bias=attention_bias and family.qkv_bias is None,
            mlp_bias=mlp_bias,
            experts=experts,
            expert_width=expert_width,
            expert_layers=frozenset(_expert_layers(checkpoint.text_config, layers)) if experts else frozenset(),
            generates=not names or any(name.endswith(("LM", "Generation", "LMHeadModel")) for name in names),
        ),
        [],
    )


def _expert_layers(config: Mapping[str, Any], layers: int) -> Iterator[int]:
    """Indices of the blocks whose MLP is a mixture of experts (Qwen3-MoE's two rules; all for Mixtral)."""
    step = config.get("decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers")
    skipped = {item for item in dense if isinstance(item, int)} if isinstance(dense, list) else set()
    step = step if isinstance(step, int) and step > 0 else 1
    return (index for index in range(layers) if index not in skipped and (index + 1) % step == 0)


class _Reader:
    """Typed access to config.json that collects what is wrong."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.findings: list[Finding] = []

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer within ``LIMITS``; 0 with a finding when it is none."""
        value = self.config.get(key)
        if value is None:
            if default is None:
                self.findings.append(
                    Finding.error(
                        "config-missing-field",
                        f"config.json has no {key}; the shapes of the model follow from it",
                        [key],
                        "copy config.json from the base model (and keep its quantization_config)",
                    )
                )
            return default or 0
        if isinstance(value, bool) or not isinstance(value, int):
            self.bad(key, f"{short(value)} is not an integer")
        elif value <= 0:
            self.bad(key, f"{value} is not positive")
        elif value > LIMITS[key]:
            self.bad(key, f"{short(value)} is beyond any model (limit {LIMITS[key]})")
        else:
            return value
        return 0

    def boolean(self, key: str, default: bool) -> bool:
        """A boolean; anything else is a finding."""
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.bad(key, f"{short(value)} is not true or false")
            return default
        return value

    def bad(self, key: str, why: str) -> None:
        """Record that a field cannot be used."""
        self.findings.append(
            Finding.error("config-bad-field", f"config.json: {key}: {why}", [key], f"correct {key} in config.json")
        )


def short(value: object) -> str:
    """A value as a person can read it in one message, at most 60 characters."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**18:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
