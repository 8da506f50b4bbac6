"""What a vLLM layer is fused from, and which part of it this rank holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import BasevLLMParameter, ChannelQuantScaleParameter, RowvLLMParameter

ShardId = str | int | tuple[int, ...] | None
Loader = Callable[..., None]

QKV = ("q", "k", "v", "index_q", "index_k")
"""vLLM's ids of what is fused into an attention's input layer."""


class Shards:
    """The checkpoint's modules in one layer.

    Args:
        layer: the vLLM layer.
        modules: the checkpoint's modules that are fused into it, in this order.
        count: of what vLLM fuses in it.
        loader: the layer's own weight loader.

    Attributes:
        name: the layer's dotted name in the engine's model, e.g. ``model.layers.0.self_attn.qkv_proj``.
        modules: by vLLM's shard id, e.g. ``{"q": "model.layers.0.self_attn.q_proj", ...}``; ``{None: module}`` where
            nothing is fused, and the layer's name for each where its modules are not known.
        k: in_features over all ranks.
    """

    def __init__(self, layer: Module, modules: Sequence[str], count: int, loader: Loader) -> None:
        self.layer = layer
        self.name: str = getattr(layer, "prefix", "") or type(layer).__name__
        ids: Sequence[ShardId] = QKV[:count] if isinstance(layer, QKVParallelLinear) else range(count)
        names = modules if len(modules) == count else [self.name] * count
        self.modules = dict(zip(ids if count > 1 else (None,), names, strict=True))
        self.k = int(layer.input_size)
        self.loader = _head_loader(layer) if isinstance(layer, ParallelLMHead) else loader

    def n(self, shard: ShardId) -> int | None:
        """out_features of the checkpoint tensor of a shard, over all ranks; None when the layer does not say."""
        layer = self.layer
        if isinstance(layer, ParallelLMHead):
            return int(layer.org_vocab_size)
        if isinstance(layer, QKVParallelLinear):  # whose output_size counts replicated heads once a rank
            heads, kv_heads = layer.total_num_heads, layer.total_num_kv_heads
            sizes = {"q": heads * layer.head_size, "k": kv_heads * layer.head_size, "v": kv_heads * layer.v_head_size}
            return sum(sizes.values()) if shard is None else sizes.get(str(shard))
        if isinstance(shard, tuple):
            return sum(layer.output_sizes[one] for one in shard)
        return int(layer.output_size if shard is None else layer.output_sizes[shard])

    def module(self, shard: ShardId) -> str:
        """The checkpoint's module, for messages; the layer's name where the file has it fused."""
        return self.modules.get(shard, self.name)

    def ids(self, shard: ShardId) -> Sequence[ShardId]:
        """The single shards of one that vLLM names: all of them, several or one."""
        if shard is None:
            return list(self.modules)
        return shard if isinstance(shard, tuple) else (shard,)

    def load(self, parameter: Parameter, tensor: Tensor, shard: ShardId) -> None:
        """Let the layer place its part of a checkpoint tensor."""
        self.loader(parameter, tensor, *(() if shard is None else (shard,)))

    def local(self, dimension: str, size: int, full: int, shard: ShardId) -> Tensor:
        """For each of `full` checkpoint indices its index on this rank, or -1: asked of the layer's own loader.

        Args:
            dimension: "output_dim" or "input_dim".
            size: of the dimension on this rank.
            full: its length in the checkpoint.
            shard: whose tensor it is.
        """
        if dimension == "input_dim" and size == full:
            return torch.arange(full, device="cpu")
        kind = ChannelQuantScaleParameter if dimension == "output_dim" else RowvLLMParameter
        zeros = torch.zeros(size, dtype=torch.int64, device="cpu")
        probe: BasevLLMParameter = kind(data=zeros, weight_loader=self.loader, **{dimension: 0})
        probe.tp_rank, probe.tp_size = self.layer.tp_rank, self.layer.tp_size
        self.load(probe, torch.arange(1, full + 1, device="cpu"), shard)
        here = probe.data.nonzero().view(-1)
        local = torch.full((full,), -1, dtype=torch.int64, device="cpu")
        local[probe.data[here] - 1] = here
        return local


def _head_loader(layer: Module) -> Loader:
    """As vLLM's output layer loads, for parameters that grow with N in any dimension; the padding is zero."""

    def load(parameter: BasevLLMParameter, tensor: Tensor) -> None:
        dim, per, here = parameter.output_dim, getattr(parameter, "packed_factor", 1), layer.shard_indices
        first, last = int(here.org_vocab_start_index // per), ceil(here.org_vocab_end_index / per)
        parameter.data.zero_()
        parameter.data.narrow(dim, 0, last - first).copy_(tensor.narrow(dim, first, last - first))

    return load
