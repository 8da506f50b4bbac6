"""Tensors whose length only the file knows: what they add to a layer's weight on this rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from quantserve_kernels.vllm.shards import ShardId, Shards

if TYPE_CHECKING:
    from quantserve_kernels.vllm.format import Format

Tensors = Mapping[str, Tensor]
"""The tensors of a linear by suffix."""

CSR = tuple[Tensor, Tensor, Tensor]
"""rows int32 [n + 1], cols int32 [nnz], vals float32 [nnz]."""


class Entries(NamedTuple):
    """What ragged tensors add to a weight [n, k]: positions int64 [nnz], values float32 [nnz]. Repeated ones add up."""

    out_features: Tensor
    in_features: Tensor
    values: Tensor


class Ragged:
    """The ragged tensors of one layer, collected on the CPU.

    Args:
        format: whose `ragged` names the sets and whose `entries` reads them.
        shards: of the layer.
        n, k: out_features and in_features of this rank.
    """

    def __init__(self, format: Format, shards: Shards, n: int, k: int) -> None:
        self.format, self.shards, self.n, self.k = format, shards, n, k
        self.pieces: dict[ShardId, dict[str, Tensor]] = {}  # of sets that are not complete yet
        self.parts: list[Entries] = []

    def add(self, suffix: str, tensor: Tensor, shard: ShardId) -> None:
        """Keep a tensor; when its set is complete, keep this rank's entries instead.

        Raises:
            ValueError: the tensors of a set do not fit each other or the linear; names the module.
        """
        pieces = self.pieces.setdefault(shard, {})
        pieces[suffix] = tensor.detach().to("cpu", copy=True)
        for names in self.format.ragged:
            if suffix in names and all(name in pieces for name in names):
                self._cut({name: pieces.pop(name) for name in names}, shard)

    def csr(self, device: torch.device) -> CSR | None:
        """This rank's entries in rising order, each position once; None where there are none."""
        parts, self.parts = self.parts, []
        if not any(part.values.numel() for part in parts):
            return None
        # vLLM sets default dtype and device while it loads; nothing here may depend on them.
        n_index, k_index, values = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        positions, inverse = torch.unique(n_index * self.k + k_index, return_inverse=True)
        sums = torch.zeros(positions.numel(), dtype=torch.float32, device="cpu").index_add_(0, inverse, values)
        rows = torch.zeros(self.n + 1, dtype=torch.int32, device="cpu")
        rows[1:] = torch.bincount(positions // self.k, minlength=self.n).cumsum(0)
        return rows.to(device), (positions % self.k).to(device, torch.int32), sums.to(device)

    def _cut(self, tensors: Tensors, shard: ShardId) -> None:
        n, k = self.shards.n(shard), self.shards.k
        if n is None:
            raise NotImplementedError(f"{self.shards.name}: ragged tensors of shard {shard!r}, whose size is unknown")
        try:
            entries = self.format.entries(tensors, (n, k))
        except ValueError as error:
            raise ValueError(f"{self.shards.module(shard)}: {error}. Fix: convert the checkpoint again") from error
        n_local = self.shards.local("output_dim", self.n, n, shard)[entries.out_features]
        k_local = self.shards.local("input_dim", self.k, k, shard)[entries.in_features]
        mine = (n_local >= 0) & (k_local >= 0)
        self.parts.append(Entries(n_local[mine], k_local[mine], entries.values[mine]))
