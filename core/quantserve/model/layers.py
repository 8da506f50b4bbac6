"""Which tensors a model must have, from config.json: its decoder linears and everything beside them.

N is out_features and K is in_features throughout; an unquantized linear stores ``[N, K]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from quantserve.checkpoint.data import DTYPE_BITS
from quantserve.families import section_path
from quantserve.model.architecture import Architecture, class_names, read_architecture
from quantserve.model.attention import size_of
from quantserve.model.linear import Linear, expert_of, grouped, stack_of
from quantserve.once import once

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint, Tensor

_BLOCK = re.compile(r"^((.*?)\b(?:layers|h|blocks)\.)(\d+)\.")
_LLAMA_BLOCK = re.compile(r"^(.*?)layers\.\d+\.(?:self_attn|mlp|block_sparse_moe)\.")
_ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "fc2", "w2", "dense", "dense_4h_to_h", "c_proj", "output_linear")
_FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj", "q_a_proj": "fused_qkv_a_proj", "kv_a_proj_with_mqa": "fused_qkv_a_proj",
    "in_proj_qkv": "in_proj_qkvz", "in_proj_z": "in_proj_qkvz", "in_proj_b": "in_proj_ba", "in_proj_a": "in_proj_ba",
}  # fmt: skip
_PLACES = {name: place for place, name in enumerate(_FUSED)}
# The projections to the low rank of latent attention: whole on every rank.
_REPLICATED = ("q_a_proj", "kv_a_proj_with_mqa")
# Latent attention without q_lora_rank has one of the two alone.
_FUSED_ONLY_WITH = {"kv_a_proj_with_mqa": "q_a_proj"}
# How checkpoints of vLLM's mixtures name what chooses the experts, and what weights a shared expert.
_ROUTERS = re.compile(
    r"\.(?:gate|gate\.wg|router|router\.\w+|v_router|modality_router|shared_expert_gate|text_experts_gate"
    r"|vision_experts_gate)$"
)
# Stored with a value in every element; one byte may hold two codes, so K is not known of U8.
_WHOLE_DTYPES = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2", "I8")
PACKED = ("qweight", "weight_packed")
"""What the codes of a quantized linear are called, where not ``weight``."""
SPEECH_PARTS = ("talker.", "token2wav.", "code2wav.")
"""Beginnings of the tensors of Qwen-Omni that make speech; vLLM loads the ``thinker.`` alone."""


def in_layer_order(parts: Iterable[Linear]) -> list[Linear]:
    """The parts of one of vLLM's fused layers, in the order in which it puts them side by side."""
    return sorted(parts, key=lambda part: _PLACES.get(part.name.rpartition(".")[2], -1))


@once
def linears(checkpoint: Checkpoint) -> tuple[Linear, ...]:
    """The decoder linears of a model, in block order.

    From config.json for the families Llama, Mistral, Mixtral, Qwen2, Qwen3, Phi-3, Gemma and their
    like, whatever tensors the files hold. For other families: the modules of numbered blocks that
    have a 2-d ``.weight``, or a 3-d one that stacks experts; quantized modules whose N and K only the
    method knows are left out (see `quantserve.model.modules.undescribed`). The experts of a layer that
    are alike are one entry, listed or stacked. Routers are no linears: vLLM builds them without the
    quantization method. Empty when config.json's numbers cannot be used.
    """
    architecture, problems = read_architecture(checkpoint)
    if architecture is not None:
        return tuple(_decoder_linears(architecture, block_prefix(checkpoint), checkpoint.tensors))
    return () if problems else tuple(grouped(_derived(checkpoint)))


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


def is_router(module: str) -> bool:
    """Whether a module path is that of a mixture's router or of a shared expert's gate."""
    return _ROUTERS.search(module) is not None


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


def _decoder_linears(arch: Architecture, prefix: str, tensors: Mapping[str, Tensor]) -> Iterator[Linear]:
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
            yield from _expert_linears(arch, block, tensors)
        elif arch.family.fused:
            yield Linear(block + "mlp.gate_up_proj", 2 * arch.intermediate, arch.hidden, "column")
            yield Linear(block + "mlp.down_proj", arch.hidden, arch.intermediate, "row")
        else:
            yield Linear(block + "mlp.gate_proj", arch.intermediate, arch.hidden, "column", "gate_up_proj")
            yield Linear(block + "mlp.up_proj", arch.intermediate, arch.hidden, "column", "gate_up_proj")
            yield Linear(block + "mlp.down_proj", arch.hidden, arch.intermediate, "row")


def _expert_linears(arch: Architecture, block: str, tensors: Mapping[str, Tensor]) -> Iterator[Linear]:
    assert arch.family.experts is not None
    gate, up, down = arch.family.expert_linears
    path = f"{block}{arch.family.experts[2]}.experts"
    if arch.family.stacks and f"{path}.gate_up_proj" in tensors:
        yield Linear(f"{path}.gate_up_proj", 2 * arch.expert_width, arch.hidden, "column", "experts", 0, arch.experts)
        yield Linear(f"{path}.down_proj", arch.hidden, arch.expert_width, "row", "experts", 0, arch.experts)
        return
    yield _experts(path, gate, arch.experts, arch.expert_width, arch.hidden, "column")
    yield _experts(path, up, arch.experts, arch.expert_width, arch.hidden, "column")
    yield _experts(path, down, arch.experts, arch.hidden, arch.expert_width, "row")


def _experts(path: str, leaf: str, count: int, n: int, k: int, parallel: Literal["column", "row"]) -> Linear:
    listed = tuple(f"{path}.{expert}.{leaf}" for expert in range(count))
    return Linear(listed[0], n, k, parallel, "experts", 0, count, listed)


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
    hidden = size_of(checkpoint.text_config, "hidden_size")
    for name, tensor in sorted(checkpoint.tensors.items()):
        module, _, suffix = name.rpartition(".")
        shape, stack = tensor.shape, stack_of(name) if len(tensor.shape) == 3 else None
        if stack is not None:
            module, suffix = stack
        if suffix != "weight" or len(shape) != (3 if stack else 2) or 0 in shape or block_of(name) is None:
            continue
        leaf = module.rpartition(".")[2]
        # A reader gives the shapes of dtypes of its own in elements.
        whole = tensor.dtype in _WHOLE_DTYPES or tensor.dtype not in DTYPE_BITS
        if "embed" in leaf or "norm" in leaf or not whole or is_router(module):
            continue
        parallel: Literal["column", "row"] = "row" if leaf in _ROW_PARALLEL else "column"
        if stack is not None:
            n, k = oriented(shape[1], shape[2], parallel, hidden)
            yield Linear(module, n, k, parallel, "experts", 0, shape[0])
        else:
            # Every rank has the whole indexer of DeepSeek's sparse attention.
            most = 1 if leaf in _REPLICATED or ".indexer." in name else 0
            yield Linear(module, shape[0], shape[1], parallel, fused_into(module, checkpoint), most)


def oriented(n: int, k: int, parallel: str, hidden: int) -> tuple[int, int]:
    """N and K of stacked experts, which some families store as [e, k, n]: what a token enters or leaves is `hidden`."""
    outer, inner = (k, n) if parallel == "column" else (n, k)
    return (k, n) if outer != hidden and inner == hidden else (n, k)


def fused_into(module: str, checkpoint: Checkpoint) -> str:
    """The layer vLLM fuses a module into, by its name; "" for none."""
    parent, _, leaf = module.rpartition(".")
    if expert_of(module):
        return "experts"
    needs = _FUSED_ONLY_WITH.get(leaf)
    if needs and not any(f"{parent}.{needs}.{part}" in checkpoint.tensors for part in ("weight", *PACKED)):
        return ""
    return _FUSED.get(leaf, "")
