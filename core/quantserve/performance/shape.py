"""What one rank computes for one token: the matrices of a decoder as the engine runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantserve.architecture import Architecture, read_architecture
from quantserve.dtypes import DTYPE_BYTES, served_dtype
from quantserve.kv_cache import KvCache, kv_cache
from quantserve.layers import linears

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint
    from quantserve.config import ModelConfig
    from quantserve.target import Target

_FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear of one rank, fused as the engine fuses it: ``n`` out, ``k`` in features, in ``count`` layers."""

    name: str
    n: int
    k: int
    count: int

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


def read_shape(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> Shape | None:
    """The shape of a model on one rank, from config.json; None for a family nobody here knows."""
    architecture, _ = read_architecture(checkpoint)
    if architecture is None:
        return None
    ranks = model.tensor_parallel_size
    dtype_bytes = DTYPE_BYTES.get(served_dtype(checkpoint, model, target).name, 2)
    cache = kv_cache(checkpoint, model, ranks, dtype_bytes)
    return _shape(architecture, ranks, dtype_bytes, cache, _chosen(checkpoint))


def _shape(arch: Architecture, ranks: int, dtype_bytes: int, cache: KvCache, experts_per_token: int) -> Shape:
    heads, kv_heads = _share(arch.heads, ranks), _share(arch.kv_heads, ranks)
    q, kv = heads * arch.head_dim, kv_heads * arch.head_dim
    with_experts = len(arch.expert_layers)
    mlp = _share(arch.intermediate, ranks)
    dense = [
        Matrix("qkv_proj", q + 2 * kv, arch.hidden, arch.layers),
        Matrix("o_proj", arch.hidden, q, arch.layers),
    ]
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
    # Per layer: two norms with the residual (8 hidden), rotary embedding and the attention's own output
    # (2 (q + kv) + q), and the gated product of the MLP (3 intermediate).
    elements = arch.layers * (8 * arch.hidden + 3 * q + 2 * kv + 3 * wide)
    return Shape(
        ranks=ranks,
        dense=tuple(dense),
        expert=expert,
        experts=arch.experts if with_experts else 0,
        experts_per_token=chosen,
        lm_head=Matrix("lm_head", _share(arch.vocab, ranks), arch.hidden, 1) if arch.generates else None,
        layers=arch.layers,
        hidden=arch.hidden,
        heads=heads,
        head_dim=arch.head_dim,
        kv_bytes=cache.bytes_per_token / max(1, cache.full_layers + cache.sliding_layers),
        sliding_layers=cache.sliding_layers,
        window=cache.window,
        dtype_bytes=dtype_bytes,
        vector_elements=elements,
    )


def stored_bits_per_weight(checkpoint: Checkpoint) -> float | None:
    """Bits that the files keep for one weight of a decoder linear, scales and tables included; None without tensors.

    Floating-point tensors count as the 16 bits they are served in.
    """
    if not checkpoint.tensors:
        return None
    weights = 0
    names = set()
    for linear in linears(checkpoint):
        weights += linear.n * linear.k
        names.add(linear.name)
    bits = 0
    for tensor in checkpoint.tensors.values():
        module, _, suffix = tensor.name.rpartition(".")
        if module in names and suffix != "bias":
            plain = tensor.dtype in _FLOATS and suffix == "weight"
            bits += 16 * _count(tensor.shape) if plain else 8 * tensor.nbytes
    return bits / weights if weights and bits else None


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _share(size: int, ranks: int) -> int:
    return max(1, size // ranks)


def _chosen(checkpoint: Checkpoint) -> int:
    """Experts a token is sent to; Mixtral's default is 2."""
    value = checkpoint.text_config.get("num_experts_per_tok")
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1024 else 2
