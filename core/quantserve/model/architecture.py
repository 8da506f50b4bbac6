"""The shape of a decoder, read from config.json: how many layers, how wide, with which biases.

Sizes are known of every decoder that transformers or vLLM can configure. Names of tensors are known of the families
that follow Llama's; the others are checked by what the files hold. Every number is bounded, so a hostile config.json
costs findings, not time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantserve.families import layer_list
from quantserve.finding import Finding
from quantserve.model.attention import architectures, layer_count, read_heads, size_of
from quantserve.once import once

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Family:
    """How a family names its tensors, and what its config.json does not say. Defaults are in families.json."""

    qkv_bias: bool | None = None  # None: as config.json says in attention_bias
    mlp_bias: bool = False  # whether the family reads mlp_bias
    qk_norm: bool = False
    fused: bool = False  # qkv_proj and gate_up_proj are one tensor each in the file
    block_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    experts: tuple[str, int, str] | None = None  # config key, its default, name of the block's expert module
    expert_width: str = "intermediate_size"
    expert_linears: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    stacks: bool = False  # whether vLLM loads experts.gate_up_proj and experts.down_proj, which stack all experts, too


_GEMMA2_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(mlp_bias=True),
    "granite": Family(mlp_bias=True),
    "smollm3": Family(mlp_bias=True),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "qwen3_moe": Family(
        qk_norm=True, experts=("num_experts", 128, "mlp"), expert_width="moe_intermediate_size", stacks=True
    ),
    "mixtral": Family(experts=("num_local_experts", 8, "block_sparse_moe"), expert_linears=("w1", "w3", "w2")),
    "phi3": Family(fused=True),
    "gemma": Family(),
    "gemma2": Family(block_norms=_GEMMA2_NORMS),
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
    shared_width: int = 0  # features of the experts that every token passes
    generates: bool = True  # has an lm_head: not a bare encoder or embedding model
    known: bool = True  # whether the names of its tensors are known


def model_type(checkpoint: Checkpoint) -> str:
    """The family name of the language model: its config's ``model_type``, else from ``architectures``."""
    for value in (checkpoint.text_config.get("model_type"), checkpoint.config.get("model_type")):
        if isinstance(value, str) and value:
            return value
    return next((_BY_CLASS[name] for name in class_names(checkpoint) if name in _BY_CLASS), "")


def class_names(checkpoint: Checkpoint) -> list[str]:
    """The strings under ``architectures`` of config.json."""
    return architectures(checkpoint)


@once
def read_architecture(checkpoint: Checkpoint) -> tuple[Architecture | None, list[Finding]]:
    """Read config.json's numbers for a family with known tensor names.

    Returns the architecture, or None when the family is unknown or a number is unusable, and one
    finding per unusable field, or missing field that has no default.
    """
    kind = model_type(checkpoint)
    family = FAMILIES.get(kind)
    made, findings = _read(checkpoint, kind, family or Family())
    if family is None:
        # Other families use other names (n_layer, d_model); their absence says nothing.
        return None, [finding for finding in findings if finding.code == "config-bad-field"]
    return made, findings


@once
def read_sizes(checkpoint: Checkpoint) -> Architecture | None:
    """The sizes of a decoder of any family, for estimates; None when config.json does not give them.

    Of a family with unknown tensor names ``family`` is a plain `Family`, and ``known`` is False.
    """
    architecture, problems = read_architecture(checkpoint)
    if architecture is not None or problems:
        return architecture
    made, _ = _read(checkpoint, model_type(checkpoint), None)
    return made


_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "inner_hidden_size")
_EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
_EXPERT_WIDTHS = ("moe_intermediate_size", "expert_intermediate_size", "moe_ffn_hidden_size", "intermediate_size")


def _read(checkpoint: Checkpoint, kind: str, family: Family | None) -> tuple[Architecture | None, list[Finding]]:
    config = checkpoint.text_config
    reader = _Reader(config)
    layers = reader.integer("num_hidden_layers", None if family else layer_count(config))
    hidden = reader.integer("hidden_size", None if family else size_of(config, "n_embd", "d_model"))
    heads = reader.integer("num_attention_heads", None if family else size_of(config, "n_head", "n_heads"))
    vocab = reader.integer("vocab_size")
    experts = expert_width = 0
    if family is not None and family.experts is not None:
        experts = reader.integer(family.experts[0], family.experts[1])
        expert_width = reader.integer(family.expert_width)
    elif family is None:
        experts = size_of(config, *_EXPERTS)
        expert_width = size_of(config, *_EXPERT_WIDTHS) if experts else 0
    intermediate = reader.integer("intermediate_size", None if family else (size_of(config, *_WIDTHS) or 4 * hidden))
    given_dim = reader.integer("head_dim", 0)
    kv_given = reader.integer("num_key_value_heads", heads)
    read = read_heads(checkpoint) if family is None else None
    kv_heads = read.kv if read and not read.latent else kv_given
    tied = reader.boolean("tie_word_embeddings", False)
    attention_bias = reader.boolean("attention_bias", reader.boolean("bias", False))
    mlp_bias = reader.boolean("mlp_bias", False) and bool(family and family.mlp_bias)
    if reader.findings:
        return None, reader.findings
    if not (layers and hidden and heads and vocab):
        return None, []
    if not given_dim and hidden % heads and family is not None:
        reader.bad(
            "hidden_size", f"{hidden} is not divisible by num_attention_heads {heads}, and head_dim is not given"
        )
    if heads % kv_heads and family is not None:
        reader.bad("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
    if layers * experts > MAX_EXPERTS_OF_A_MODEL:
        reader.bad(
            family.experts[0] if family and family.experts else "experts", f"{experts} in each of {layers} layers"
        )
    if reader.findings:
        return None, reader.findings
    names = class_names(checkpoint)
    qkv_bias = family.qkv_bias if family is not None else None
    return (
        Architecture(
            model_type=kind,
            family=family or Family(),
            known=family is not None,
            layers=layers,
            hidden=hidden,
            intermediate=intermediate,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=given_dim or (read.size if read and not read.latent else 0) or max(1, hidden // heads),
            vocab=vocab,
            tied=tied,
            qkv_bias=qkv_bias if qkv_bias is not None else reader.boolean("qkv_bias", attention_bias),
            o_bias=attention_bias and qkv_bias is None,
            mlp_bias=mlp_bias,
            experts=experts,
            expert_width=expert_width,
            expert_layers=frozenset(_expert_layers(config, layers)) if experts else frozenset(),
            shared_width=_shared_width(config, expert_width) if experts and family is None else 0,
            generates=_generates(checkpoint, names),
        ),
        [],
    )


def _generates(checkpoint: Checkpoint, names: list[str]) -> bool:
    """Whether vLLM builds an lm_head: not for a bare encoder, nor for an embedder of sentence-transformers."""
    if "modules.json" in checkpoint.files:
        return False
    return not names or any(name.endswith(("LM", "Generation", "LMHeadModel")) for name in names)


def _expert_layers(config: Mapping[str, Any], layers: int) -> Iterator[int]:
    """Indices of the blocks whose MLP is a mixture of experts; all unless the config tells otherwise."""
    kinds = layer_list(config, "mlp_layer_types", layers)
    if kinds is not None:
        return (index for index, kind in enumerate(kinds) if kind not in ("dense", "mlp"))
    step, every = _step(config.get("decoder_sparse_step")), _step(config.get("moe_layer_freq"))
    dense = config.get("mlp_only_layers")
    skipped = {item for item in dense if isinstance(item, int)} if isinstance(dense, list) else set()
    first = size_of(config, "first_k_dense_replace", "moe_layer_start_index", "n_dense_layers", "num_dense_layers")
    return (
        index
        for index in range(layers)
        if index >= first and index not in skipped and (index + 1) % step == 0 and index % every == 0
    )


def _step(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 1


def _shared_width(config: Mapping[str, Any], expert_width: int) -> int:
    """Features of the experts that every token passes."""
    given = size_of(config, "shared_expert_intermediate_size", "shared_intermediate_size")
    return given or expert_width * size_of(config, "n_shared_experts", "num_shared_experts", "moe_num_shared_experts")


class _Reader:
    """Typed access to config.json that collects what is wrong."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.findings: list[Finding] = []

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer within ``LIMITS``; 0 with a finding when it is none."""
        value = self.config.get(key)
        if isinstance(value, list) and value and all(type(item) is int for item in value):
            value = max(value)  # one number a layer (Gemma 3n)
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
