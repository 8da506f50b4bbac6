"""What one rank computes for one token: the matrices of a decoder as the engine runs them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from quantserve.model.architecture import Architecture, read_sizes
from quantserve.model.attention import Heads, attention_layers, read_heads, size_of
from quantserve.model.dtypes import DTYPE_BYTES, served_dtype
from quantserve.model.kv_cache import KvCache, kv_cache
from quantserve.model.layers import linears, lm_head_name, split_block
from quantserve.model.linear import Linear, shard_k, shard_n
from quantserve.model.modules import modules

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint, Tensor
    from quantserve.checks.stored import Stored
    from quantserve.config import ModelConfig
    from quantserve.target import Target

_FLOATS = ("F16", "BF16", "F32", "F64")
# Linears of encoders beside the decoder, which text requests do not pass.
TOWER = re.compile(r"(?:^|\.)(?:vis|audio|img|image|speech|resampler|encoder\.)")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear of one rank, fused as the engine fuses it: ``n`` out, ``k`` in features, in ``count`` layers.

    Attributes:
        bits: of a weight in memory, scales included; None: those that the method usually keeps.
        quantized: whether it is in the method's scheme.
    """

    name: str
    n: int
    k: int
    count: int
    bits: float | None = None
    quantized: bool = True

    @property
    def weights(self) -> int:
        """Weights of one of them."""
        return self.n * self.k


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder on one of ``ranks`` tensor-parallel ranks.

    Attributes:
        dense: linears every token passes.
        expert: the linears of one expert; ``count`` is the number of layers with experts.
        experts, experts_per_token: of each such layer; 0 without.
        lm_head: the output projection; None for a model that generates nothing.
        layers, hidden, heads, head_dim: heads are this rank's.
        full_layers: layers that attend to every token before.
        kv_bytes: KV cache of one token in one layer on this rank, in bytes.
        sliding_layers, window: layers that attend to the last ``window`` tokens only.
        dtype_bytes: of activations and unquantized weights.
        vector_elements: activations read or written per token outside the matrices, over all layers.
    """

    ranks: int
    dense: tuple[Matrix, ...]
    expert: tuple[Matrix, ...]
    experts: int
    experts_per_token: int
    lm_head: Matrix | None
    layers: int
    hidden: int
    heads: int
    head_dim: int
    kv_bytes: float
    full_layers: int
    sliding_layers: int
    window: int
    dtype_bytes: int
    vector_elements: int

    @property
    def linear_weights(self) -> int:
        """Weights of all decoder linears of this rank, every expert included."""
        each = sum(matrix.weights * matrix.count for matrix in self.expert)
        return sum(matrix.weights * matrix.count for matrix in self.dense) + each * self.experts

    def distinct_experts(self, tokens: float) -> float:
        """Experts of a layer that at least one of ``tokens`` chooses, if all are equally likely.

        A token leaves an expert out with probability 1 - chosen / experts, independently of the others.
        """
        if not self.experts:
            return 0.0
        left_out: float = (1 - self.experts_per_token / self.experts) ** tokens
        return self.experts * (1 - left_out)


def read_shape(
    checkpoint: Checkpoint, model: ModelConfig, target: Target, stored: Stored | None = None
) -> Shape | None:
    """The shape of a model on one rank; None where config.json does not give the sizes of a decoder.

    The matrices are those of `stored`, each with its bits. Without it they are the usual ones for the config's numbers,
    or, of a family with unknown tensor names, those of the files where they hold plain weights.
    """
    architecture = read_sizes(checkpoint)
    kinds = attention_layers(checkpoint)
    if architecture is None or (kinds is not None and set(kinds) <= {"state", "none"}):
        return None  # without attention the usual matrices are not those of the model
    ranks = model.tensor_parallel_size
    dtype_bytes = DTYPE_BYTES.get(served_dtype(checkpoint, model, target).name, 2)
    cache = kv_cache(checkpoint, model, ranks, dtype_bytes)
    made = _shape(
        architecture, ranks, dtype_bytes, cache, _chosen(checkpoint), read_heads(checkpoint), checkpoint.text_config
    )
    if stored is not None and (stored.quantized or stored.plain):
        found = [] if stored.unsized else list(_stored_bits(checkpoint, stored, 8 * dtype_bytes))
    elif architecture.known:
        return made
    else:
        found = [(linear, None, True) for linear in linears(checkpoint)]
    blocks = [one for one in found if (block := split_block(f"{one[0].name}.")) and block[1] < architecture.layers]
    dense = _matrices([one for one in blocks if one[0].fused != "experts"], ranks)
    expert = _matrices([one for one in blocks if one[0].fused == "experts"], ranks)
    if not dense or bool(expert) != bool(made.expert):
        return made
    head = next((one for one in found if f"{one[0].name}.weight" == lm_head_name(checkpoint)), None)
    lm_head = made.lm_head and head and replace(made.lm_head, bits=head[1], quantized=head[2])
    return replace(made, dense=dense, expert=expert, lm_head=lm_head or made.lm_head)


_Found = tuple[Linear, float | None, bool]
"""A linear, the bits of its weights, and whether it is quantized."""


def _stored_bits(checkpoint: Checkpoint, stored: Stored, plain_bits: int) -> Iterator[_Found]:
    """The linears with the bits of a weight in memory: as the scheme says, else as the first expert is stored."""
    present = modules(checkpoint)
    for linear, scheme in stored.quantized:
        bits = scheme.kept
        if bits is None:
            tensors = (tensor for suffix, tensor in present.get(linear.name, {}).items() if suffix in scheme.parts)
            each = linear.n * linear.k * (linear.experts if linear.stacked else 1)
            bits = sum(_bits(tensor, plain_bits) for tensor in tensors) / each
        if bits:
            yield linear, bits, True
    for linear in stored.plain:
        yield linear, float(plain_bits), False


def _matrices(found: list[_Found], ranks: int) -> tuple[Matrix, ...]:
    """The matrices of one rank: parts that the engine fuses are one, with the mean of their bits."""
    fused: dict[tuple[str, str, int], dict[str, _Found]] = {}
    for one in found:
        linear = one[0]
        if not TOWER.search(linear.name):
            parts = fused.setdefault((linear.group, linear.parallel, linear.k), {})
            parts.setdefault(linear.name.rpartition(".")[2], one)  # of experts stored differently, the first
    counts: Counter[Matrix] = Counter()
    for parts in fused.values():
        first = next(iter(parts.values()))[0]
        n = sum(max(1, shard_n(linear, ranks)) for linear, _, _ in parts.values())
        bits = None
        if all(width is not None for _, width, _ in parts.values()):
            bits = sum(linear.n * (width or 0) for linear, width, _ in parts.values()) / sum(
                linear.n for linear, _, _ in parts.values()
            )
        name = ("experts." if first.fused == "experts" else "") + "_".join(parts)
        quantized = any(one[2] for one in parts.values())
        counts[Matrix(name, n, max(1, shard_k(first, ranks)), 1, bits, quantized)] += 1
    return tuple(replace(matrix, count=count) for matrix, count in counts.items())


def _latent_matrices(arch: Architecture, heads: Heads, config: Mapping[str, Any], ranks: int) -> list[Matrix]:
    """Projections of multi-head latent attention (DeepSeek-V2, section 2.1); the small ones are on every rank."""
    rope, plain = size_of(config, "qk_rope_head_dim"), size_of(config, "qk_nope_head_dim")
    rank, value, low = (size_of(config, key) for key in ("kv_lora_rank", "v_head_dim", "q_lora_rank"))
    mine = _share(heads.query, ranks)
    query = [Matrix("q_a_proj", low, arch.hidden, arch.layers)] if low else []
    return [
        *query,
        Matrix("q_b_proj", mine * (plain + rope), low or arch.hidden, arch.layers),
        Matrix("kv_a_proj", rank + rope, arch.hidden, arch.layers),
        Matrix("kv_b_proj", mine * (plain + value), rank, arch.layers),
        Matrix("o_proj", arch.hidden, mine * value, arch.layers),
    ]


def _shape(
    arch: Architecture,
    ranks: int,
    dtype_bytes: int,
    cache: KvCache,
    experts_per_token: int,
    given: Heads | None,
    config: Mapping[str, Any],
) -> Shape:
    heads, kv_heads = _share(arch.heads, ranks), _share(arch.kv_heads, ranks)
    q, kv = heads * arch.head_dim, kv_heads * arch.head_dim
    with_experts = len(arch.expert_layers)
    mlp = _share(arch.intermediate, ranks)
    dense = [
        Matrix("qkv_proj", q + 2 * kv, arch.hidden, arch.layers),
        Matrix("o_proj", arch.hidden, q, arch.layers),
    ]
    if given is not None and given.latent:
        dense = _latent_matrices(arch, given, config, ranks)
    if arch.layers > with_experts:
        plain = arch.layers - with_experts
        dense += [
            Matrix("gate_up_proj", 2 * mlp, arch.hidden, plain),
            Matrix("down_proj", arch.hidden, mlp, plain),
        ]
    expert: tuple[Matrix, ...] = ()
    chosen, wide = 0, mlp
    if with_experts:
        width = _share(arch.expert_width, ranks)
        chosen = min(experts_per_token, arch.experts)
        wide = width * chosen
        expert = (
            Matrix("experts.gate_up", 2 * width, arch.hidden, with_experts),
            Matrix("experts.down", arch.hidden, width, with_experts),
        )
        if arch.shared_width:
            shared = _share(arch.shared_width, ranks)
            dense += [
                Matrix("shared_expert.gate_up", 2 * shared, arch.hidden, with_experts),
                Matrix("shared_expert.down", arch.hidden, shared, with_experts),
            ]
    # Per layer: two norms with the residual (8 hidden), rotary embedding and the attention's own output
    # (2 (q + kv) + q), and the gated product of the MLP (3 intermediate).
    elements = arch.layers * (8 * arch.hidden + 3 * q + 2 * kv + 3 * wide)
    return Shape(
        ranks=ranks,
        dense=tuple(dense),
        expert=expert,
        experts=arch.experts if with_experts else 0,
        experts_per_token=chosen,
        lm_head=Matrix("lm_head", _share(arch.vocab, ranks), arch.hidden, 1, quantized=False)
        if arch.generates
        else None,
        layers=arch.layers,
        hidden=arch.hidden,
        heads=heads,
        head_dim=arch.head_dim,
        full_layers=cache.full_layers if cache.known else arch.layers,
        kv_bytes=cache.bytes_per_token / max(1, cache.full_layers + cache.sliding_layers),
        sliding_layers=cache.sliding_layers,
        window=cache.window,
        dtype_bytes=dtype_bytes,
        vector_elements=elements,
    )


def stored_bits_per_weight(checkpoint: Checkpoint, stored: Stored | None = None) -> float | None:
    """Bits that the engine keeps for one weight of a decoder linear, scales and tables included; None without tensors.

    With `stored` of the quantized linears alone, if there are any. Floating-point tensors count as the 16 bits they are
    served in.
    """
    if not checkpoint.tensors:
        return None
    if stored is not None and stored.quantized and not stored.unsized:
        found = [
            (linear.weights, bits or 0) for linear, bits, quantized in _stored_bits(checkpoint, stored, 16) if quantized
        ]
        return sum(count * bits for count, bits in found) / sum(count for count, _ in found) if found else None
    sizes = read_sizes(checkpoint)
    if sizes is not None and not sizes.known:
        return _bits_of_blocks(checkpoint, sizes)
    present = modules(checkpoint)
    weights = bits = 0
    for linear in linears(checkpoint):
        weights += linear.weights
        for name in linear.names:
            bits += sum(_bits(tensor, 16) for suffix, tensor in present.get(name, {}).items() if suffix != "bias")
    return bits / weights if weights and bits else None


def _bits_of_blocks(checkpoint: Checkpoint, sizes: Architecture) -> float | None:
    """The same where the method alone knows n and k: everything in the decoder's blocks over its usual weights."""
    bits = sum(
        _bits(tensor, 16)
        for tensor in checkpoint.tensors.values()
        if len(tensor.shape) > 1 and split_block(tensor.name) and not TOWER.search(tensor.name)
    )
    quantized = any(t.dtype not in _FLOATS and len(t.shape) > 1 for t in checkpoint.tensors.values())
    if not quantized:
        return 16.0 if bits else None
    weights = linear_weights(checkpoint, sizes)
    return min(16.0, bits / weights) if weights and bits else None


def linear_weights(checkpoint: Checkpoint, sizes: Architecture) -> int:
    """Weights of all decoder linears by config.json, every expert included."""
    made = _shape(sizes, 1, 2, KvCache(), 1, read_heads(checkpoint), checkpoint.text_config)
    return made.linear_weights


def _bits(tensor: Tensor, plain_bits: int) -> int:
    """Bits in memory: of a floating-point weight in the served dtype."""
    plain = tensor.dtype in _FLOATS and tensor.name.endswith((".weight", "_proj"))
    return plain_bits * prod(tensor.shape) if plain else 8 * tensor.nbytes


def _share(size: int, ranks: int) -> int:
    return max(1, size // ranks)


def _chosen(checkpoint: Checkpoint) -> int:
    """Experts a token is sent to; Mixtral's default is 2."""
    names = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
    return min(size_of(checkpoint.text_config, *names) or 2, 1024)
