"""Which tensors a model must have, from config.json: its decoder linears and everything beside them.

N is out_features and K is in_features throughout; an unquantized linear stores ``[N, K]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from quantserve.families import section_path
from quantserve.model.architecture import Architecture, class_names, read_architecture
from quantserve.once import once

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint, Tensor

_BLOCK = re.compile(r"^((.*?)\b(?:layers|h|blocks)\.)(\d+)\.")
_LLAMA_BLOCK = re.compile(r"^(.*?)layers\.\d+\.(?:self_attn|mlp|block_sparse_moe)\.")
_ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "fc2", "w2", "dense", "dense_4h_to_h", "c_proj")
_FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj", "q_a_proj": "fused_qkv_a_proj", "kv_a_proj_with_mqa": "fused_qkv_a_proj",
    "in_proj_qkv": "in_proj_qkvz", "in_proj_z": "in_proj_qkvz", "in_proj_b": "in_proj_ba", "in_proj_a": "in_proj_ba",
}  # fmt: skip
# Latent attention without q_lora_rank has one of the two alone.
_FUSED_ONLY_WITH = {"kv_a_proj_with_mqa": "q_a_proj"}
_EXPERT = re.compile(r"\.experts\.\d+\.")
# How checkpoints of vLLM's mixtures name what chooses the experts, and what weights a shared expert.
_ROUTERS = re.compile(
    r"\.(?:gate|gate\.wg|router|router\.\w+|v_router|modality_router|shared_expert_gate|text_experts_gate"
    r"|vision_experts_gate)$"
)
# Stored with a value in every element; one byte may hold two codes, so K is not known of U8.
_WHOLE_DTYPES = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2", "I8")
_PACKED = ("qweight", "weight_packed")
_MAX_DOTS = 32
SPEECH_PARTS = ("talker.", "token2wav.", "code2wav.")
"""Beginnings of the tensors of Qwen-Omni that make speech; vLLM loads the ``thinker.`` alone."""


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer of a decoder block.

    Attributes:
        name: module path, ``model.layers.0.self_attn.q_proj``; tensors are ``<name>.<suffix>``.
        n: out_features.
        k: in_features.
        parallel: ``column`` when tensor parallelism splits N, ``row`` when it splits K.
        fused: the module vLLM fuses it into (``qkv_proj``, ``gate_up_proj``, ``experts``), or "".
        max_ranks: most ranks N can be split over (kv heads are replicated beyond); 0 is no limit.
        experts: how many linears of [n, k] its tensors stack; 0 where each expert has its own.
    """

    name: str
    n: int
    k: int
    parallel: Literal["column", "row"]
    fused: str = ""
    max_ranks: int = 0
    experts: int = 0

    @property
    def group(self) -> str:
        """Path of the module vLLM builds for it: its fused module, or its own."""
        if not self.fused:
            return self.name
        if self.fused == "experts":
            return self.name.partition(".experts.")[0] + ".experts"
        return f"{self.name.rpartition('.')[0]}.{self.fused}"


def shard_n(linear: Linear, ranks: int) -> int:
    """N on one of ``ranks`` tensor-parallel ranks, rounded down where it does not divide."""
    if linear.parallel == "row":
        return linear.n
    return linear.n // min(ranks, linear.max_ranks or ranks)


def shard_k(linear: Linear, ranks: int) -> int:
    """K on one of ``ranks`` tensor-parallel ranks, rounded down where it does not divide."""
    return linear.k // ranks if linear.parallel == "row" else linear.k


@once
def linears(checkpoint: Checkpoint) -> tuple[Linear, ...]:
    """The decoder linears of a model, in block order.

    From config.json for the families Llama, Mistral, Mixtral, Qwen2, Qwen3, Phi-3, Gemma and their
    like, whatever tensors the files hold. For other families: the modules of numbered blocks that
    have a 2-d ``.weight``; their quantized modules are left out, since only the method knows N and K.
    Routers are no linears: vLLM builds them without the quantization method. Empty when config.json's
    numbers cannot be used.
    """
    architecture, problems = read_architecture(checkpoint)
    if architecture is not None:
        return tuple(_decoder_linears(architecture, block_prefix(checkpoint)))
    return () if problems else tuple(_derived(checkpoint))


@once
def other_tensors(checkpoint: Checkpoint) -> Mapping[str, tuple[int, ...]]:
    """The tensors a model must have beside the weights of its linears: name -> shape.

    Embeddings, norms, router gates, lm_head unless tied, and the biases config.json asks for. Empty
    when the family is unknown.
    """
    architecture, _ = read_architecture(checkpoint)
    if architecture is None:
        return {}
    prefix = block_prefix(checkpoint)
    return MappingProxyType(dict(_other(architecture, prefix, lm_head_name(checkpoint))))


@once
def modules(checkpoint: Checkpoint) -> Mapping[str, Mapping[str, Tensor]]:
    """The tensors of the files by module: ``{"model.layers.0.mlp.up_proj": {"qweight": Tensor, ...}}``.

    A suffix may have dots: ``up_proj.weight.absmax`` belongs to ``up_proj``, as its ``weight.absmax``.
    """
    paths = _linear_paths(checkpoint)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        module = _module_of(name, checkpoint.tensors, paths)
        found.setdefault(module, {})[name[len(module) + 1 :] if module else name] = tensor
    return MappingProxyType(found)


def module_of(name: str, checkpoint: Checkpoint) -> str:
    """The module a tensor belongs to.

    That is the longest path of a linear the name begins with. Elsewhere it is the name up to its last
    dot, or up to that of the shortest tensor it extends (``weight``, ``weight.absmax``).
    """
    return _module_of(name, checkpoint.tensors, _linear_paths(checkpoint))


def _module_of(name: str, tensors: Mapping[str, Tensor], paths: frozenset[str]) -> str:
    plain = end = name.rfind(".")
    for _ in range(_MAX_DOTS):
        if end < 0:
            break
        if name[:end] in paths:
            return name[:end]
        if name[:end] in tensors:
            plain = name.rfind(".", 0, end)
        end = name.rfind(".", 0, end)
    return name[: max(plain, 0)]


@once
def engine_layers(checkpoint: Checkpoint) -> Mapping[str, tuple[str, ...]]:
    """The layers vLLM builds for the linears: path (`Linear.group`) -> paths of the modules fused into it.

    A layer of its own has none. For families known only from the files, linears that they hold quantized are included.
    """
    every = list(linears(checkpoint))
    if not other_tensors(checkpoint):
        for name in checkpoint.tensors:
            module, _, suffix = name.rpartition(".")
            if suffix in _PACKED and block_of(name) is not None:
                every.append(Linear(module, 0, 0, "column", _fused_into(module, checkpoint)))
    found: dict[str, list[str]] = {}
    for linear in every:
        found.setdefault(linear.group, []).extend([linear.name] if linear.fused else [])
    return MappingProxyType({layer: tuple(parts) for layer, parts in found.items()})


def is_router(module: str) -> bool:
    """Whether a module path is that of a mixture's router or of a shared expert's gate."""
    return _ROUTERS.search(module) is not None


@once
def _linear_paths(checkpoint: Checkpoint) -> frozenset[str]:
    return frozenset(linear.name for linear in linears(checkpoint))


@once
def block_prefix(checkpoint: Checkpoint) -> str:
    """What comes before ``layers.0``: ``model.``, or ``language_model.model.`` in a multimodal file."""
    prefixes = {match[1] for name in checkpoint.tensors if (match := _LLAMA_BLOCK.match(name))}
    if not prefixes or "model." in prefixes:
        return "model."
    text = sorted(
        prefix
        for prefix in prefixes
        if "vision" not in prefix and "audio" not in prefix and not prefix.startswith(SPEECH_PARTS)
    )
    return (text or sorted(prefixes))[0]


def lm_head_name(checkpoint: Checkpoint) -> str:
    """Name of the output projection's tensor beside this file's blocks."""
    prefix = block_prefix(checkpoint)
    outer = prefix.removesuffix("model.") if f".{prefix}".endswith(".model.") else ""
    return outer + "lm_head.weight"


def is_multimodal(checkpoint: Checkpoint) -> bool:
    """Whether the decoder is one part of a larger model, whose other tensors nobody here knows."""
    text_only = all(name.endswith(("ForCausalLM", "Model")) for name in class_names(checkpoint))
    return bool(section_path(checkpoint.config)) or not text_only


def block_of(name: str) -> tuple[int, str] | None:
    """Block number of a tensor and the rest of its name with the number cut out; None outside blocks."""
    match = _BLOCK.match(name)
    return (int(match[3][:9]), match[2] + name[match.end() :]) if match else None


def split_block(name: str) -> tuple[str, int, str] | None:
    """A tensor's name as ``("model.layers.", 7, "mlp.up_proj.weight")``; None outside blocks."""
    match = _BLOCK.match(name)
    return (match[1], int(match[3][:9]), name[match.end() :]) if match else None


def _decoder_linears(arch: Architecture, prefix: str) -> Iterator[Linear]:
    q, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    for index in range(arch.layers):
        block = f"{prefix}layers.{index}."
        attention = block + "self_attn."
        if arch.family.fused:
            yield Linear(attention + "qkv_proj", q + 2 * kv, arch.hidden, "column")
        else:
            yield Linear(attention + "q_proj", q, arch.hidden, "column", "qkv_proj")
            yield Linear(attention + "k_proj", kv, arch.hidden, "column", "qkv_proj", arch.kv_heads)
            yield Linear(attention + "v_proj", kv, arch.hidden, "column", "qkv_proj", arch.kv_heads)
        yield Linear(attention + "o_proj", arch.hidden, q, "row")
        if index in arch.expert_layers:
            yield from _expert_linears(arch, block)
        elif arch.family.fused:
            yield Linear(block + "mlp.gate_up_proj", 2 * arch.intermediate, arch.hidden, "column")
            yield Linear(block + "mlp.down_proj", arch.hidden, arch.intermediate, "row")
        else:
            yield Linear(block + "mlp.gate_proj", arch.intermediate, arch.hidden, "column", "gate_up_proj")
            yield Linear(block + "mlp.up_proj", arch.intermediate, arch.hidden, "column", "gate_up_proj")
            yield Linear(block + "mlp.down_proj", arch.hidden, arch.intermediate, "row")


def _expert_linears(arch: Architecture, block: str) -> Iterator[Linear]:
    assert arch.family.experts is not None
    gate, up, down = arch.family.expert_linears
    for expert in range(arch.experts):
        path = f"{block}{arch.family.experts[2]}.experts.{expert}."
        yield Linear(path + gate, arch.expert_width, arch.hidden, "column", "experts")
        yield Linear(path + up, arch.expert_width, arch.hidden, "column", "experts")
        yield Linear(path + down, arch.hidden, arch.expert_width, "row", "experts")


def _other(arch: Architecture, prefix: str, lm_head: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield prefix + "embed_tokens.weight", (arch.vocab, arch.hidden)
    q, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    for index in range(arch.layers):
        block = f"{prefix}layers.{index}."
        for norm in arch.family.block_norms:
            yield f"{block}{norm}.weight", (arch.hidden,)
        if arch.family.qk_norm:
            yield block + "self_attn.q_norm.weight", (arch.head_dim,)
            yield block + "self_attn.k_norm.weight", (arch.head_dim,)
        if arch.qkv_bias and not arch.family.fused:
            yield block + "self_attn.q_proj.bias", (q,)
            yield block + "self_attn.k_proj.bias", (kv,)
            yield block + "self_attn.v_proj.bias", (kv,)
        if arch.o_bias and not arch.family.fused:
            yield block + "self_attn.o_proj.bias", (arch.hidden,)
        if index in arch.expert_layers:
            assert arch.family.experts is not None
            yield f"{block}{arch.family.experts[2]}.gate.weight", (arch.experts, arch.hidden)
        elif arch.mlp_bias:
            yield block + "mlp.gate_proj.bias", (arch.intermediate,)
            yield block + "mlp.up_proj.bias", (arch.intermediate,)
            yield block + "mlp.down_proj.bias", (arch.hidden,)
    yield prefix + "norm.weight", (arch.hidden,)
    if arch.generates and not arch.tied:
        yield lm_head, (arch.vocab, arch.hidden)


def _derived(checkpoint: Checkpoint) -> Iterator[Linear]:
    for name, tensor in sorted(checkpoint.tensors.items()):
        module, _, suffix = name.rpartition(".")
        leaf = module.rpartition(".")[2]
        if suffix != "weight" or len(tensor.shape) != 2 or 0 in tensor.shape or block_of(name) is None:
            continue
        if "embed" in leaf or "norm" in leaf or tensor.dtype not in _WHOLE_DTYPES or is_router(module):
            continue
        parallel: Literal["column", "row"] = "row" if leaf in _ROW_PARALLEL else "column"
        yield Linear(module, tensor.shape[0], tensor.shape[1], parallel, _fused_into(module, checkpoint))


def _fused_into(module: str, checkpoint: Checkpoint) -> str:
    """The layer vLLM fuses a module into, by its name; "" for none."""
    parent, _, leaf = module.rpartition(".")
    if _EXPERT.search(module):
        return "experts"
    needs = _FUSED_ONLY_WITH.get(leaf)
    if needs and not any(f"{parent}.{needs}.{part}" in checkpoint.tensors for part in ("weight", *_PACKED)):
        return ""
    return _FUSED.get(leaf, "")
