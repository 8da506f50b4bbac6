"""From checkpoint tensors to one rank's part of a (perhaps fused) vLLM linear layer.

vLLM hands over whole checkpoint tensors one by one: q_proj's, then k_proj's, in any order. How many nonzeros the sparse
part has is known only then, so it is collected here and becomes buffers when all is loaded. Which output channels and
input features belong to this rank is asked of the layer's own loader, with tensors of indices: that holds for fused
layers, grouped-query replication and every kind of parallel layer alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from quantserve_squeezellm._format import CSR, DENSE, FULL, bits_of, coordinates, csr_problem, full_rows_problem

ShardId = str | int | tuple[int, ...] | None
Loader = Callable[..., None]
SPARSE = (*CSR, *FULL)


@dataclass
class LayerLoading:
    """What one layer has received so far, and how to receive more.

    Attributes:
        layer: the vLLM linear layer.
        name: its dotted name in the engine's model, e.g. `model.layers.0.self_attn.qkv_proj`.
        modules: checkpoint module of each shard id, e.g. {"q": "model.layers.0.self_attn.q_proj", ...}; {None: name}
            when the layer is not fused.
        bits: from the quantization config.
        k: in_features of this rank.  n: out_features of this rank.
        declared: what the config says each checkpoint module holds besides the dense part: {"nnz": 12, "full_rows": 0}.
        base_loader: the layer's own weight loader.
    """

    layer: Module
    name: str
    modules: dict[ShardId, str]
    bits: int
    k: int
    n: int
    declared: dict[str, dict[str, int]]
    base_loader: Loader
    received: dict[ShardId, set[str]] = field(default_factory=dict)
    pieces: dict[ShardId, dict[str, Tensor]] = field(default_factory=dict)
    entries: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def dense_loader(self, suffix: str) -> Loader:
        """The `weight_loader` of the parameter `suffix` (`qweight` or `lookup_table`)."""

        def load(param: Parameter, tensor: Tensor, shard: ShardId = None) -> None:
            self._check_dense(suffix, tensor, shard)
            try:
                self._call(param, tensor, shard)
            except (AssertionError, RuntimeError, IndexError) as error:
                raise ValueError(
                    f"{self._tensor(suffix, shard)}: shape {list(tensor.shape)} does not fit the layer {self.name} "
                    f"(this rank: in_features {self.k}, out_features {self.n}). "
                    "Fix: config.json and the tensors must come from the same model"
                ) from error
            self._mark(suffix, shard)

        return load

    def sparse_loader(self, suffix: str) -> Loader:
        """The `weight_loader` of the empty placeholder parameter `suffix`, one of `SPARSE`."""

        def load(param: Parameter, tensor: Tensor, shard: ShardId = None) -> None:
            pieces = self.pieces.setdefault(shard, {})
            pieces[suffix] = tensor.detach().to("cpu", copy=True)
            self._mark(suffix, shard)
            for group in (CSR, FULL):
                if suffix in group and all(name in pieces for name in group):
                    self._add(group, {name: pieces.pop(name) for name in group}, shard)

        return load

    def finish(self, verify: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """End the loading: this rank's sparse entries (out_features, in_features, values), then forget them.

        Raises:
            ValueError: a tensor the layer needs never came; names it.
        """
        problems = self._missing() if verify else []
        if problems:
            raise ValueError(
                f"{self.name}: the checkpoint lacks {', '.join(problems)}; the layer would compute garbage. "
                "Fix: download or convert the checkpoint again (`quantserve check` lists everything it lacks)"
            )
        # vLLM sets default dtype and device while it loads; nothing here may depend on them.
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        n_parts, k_parts, v_parts = zip((none, none, none.float()), *self.entries, strict=True)
        self.received, self.pieces, self.entries = {}, {}, []
        positions, inverse = torch.unique(torch.cat(n_parts) * self.k + torch.cat(k_parts), return_inverse=True)
        values = torch.zeros(positions.numel(), dtype=torch.float32, device="cpu")
        return positions // self.k, positions % self.k, values.index_add_(0, inverse, torch.cat(v_parts))

    def _missing(self) -> list[str]:
        problems = []
        for shard, module in self.modules.items():
            got = self.received.get(shard, set()) | self.received.get(None, set())
            wanted = set(DENSE)
            for group in (CSR, FULL):
                if got & set(group):
                    wanted |= set(group)
            declared = self.declared.get(module, {})
            wanted |= set(CSR) if declared.get("nnz") else set()
            wanted |= set(FULL) if declared.get("full_rows") else set()
            problems += [f"{module}.{suffix}" for suffix in (*DENSE, *SPARSE) if suffix in wanted - got]
        return problems

    def _tensor(self, suffix: str, shard: ShardId) -> str:
        return f"{self.modules.get(shard, self.name)}.{suffix}"

    def _mark(self, suffix: str, shard: ShardId) -> None:
        for one in shard if isinstance(shard, tuple) else (shard,):
            self.received.setdefault(one, set()).add(suffix)

    def _call(self, param: Parameter, tensor: Tensor, shard: ShardId) -> None:
        if shard is None:
            self.base_loader(param, tensor)
        else:
            self.base_loader(param, tensor, shard)

    def _check_dense(self, suffix: str, tensor: Tensor, shard: ShardId) -> None:
        name = self._tensor(suffix, shard)
        if tensor.ndim != 2:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected two dimensions")
        out = self._full_out(shard)
        if suffix == "lookup_table":
            if tensor.shape[1] != 2**self.bits:
                found = bits_of(tensor.shape[1])
                raise ValueError(
                    f"{name} has {tensor.shape[1]} entries per channel, but wbits {self.bits} means {2**self.bits}. "
                    + (f"Fix: set wbits to {found} in the quantization config" if found else "Known: 8 and 16 entries")
                )
            width = tensor.shape[0]
        else:
            if tensor.dtype != torch.int32:
                raise ValueError(
                    f"{name} is {tensor.dtype}, expected torch.int32 words. Fix: convert the checkpoint again"
                )
            full_in = int(self.layer.input_size)
            if tensor.shape[0] * 32 != self.bits * full_in:
                raise ValueError(
                    f"{name} has {tensor.shape[0]} rows of packed words, but wbits {self.bits} and in_features "
                    f"{full_in} need {self.bits * full_in / 32:g}. Fix: correct wbits, or the sizes in config.json"
                )
            width = tensor.shape[1]
        if out is not None and width != out:
            raise ValueError(
                f"{name} has {width} output channels, but config.json gives the layer {out}. "
                "Fix: config.json and the tensors must come from the same model"
            )

    def _full_out(self, shard: ShardId) -> int | None:
        """out_features of the checkpoint tensor of this shard, over all ranks; None when the layer does not say."""
        layer = self.layer
        if shard is None:
            return None if len(self.modules) > 1 else int(layer.output_size)
        if isinstance(shard, int):
            return int(layer.output_sizes[shard])
        heads = {"q": "total_num_heads", "k": "total_num_kv_heads", "v": "total_num_kv_heads"}.get(str(shard), "")
        if not hasattr(layer, heads):
            return None
        return int(getattr(layer, heads)) * int(layer.v_head_size if shard == "v" else layer.head_size)

    def _add(self, group: Sequence[str], tensors: dict[str, Tensor], shard: ShardId) -> None:
        full_in = int(self.layer.input_size)
        full_out = self._full_out(shard) or (tensors["rows"].numel() - 1 if "rows" in tensors else self.n)
        if group is CSR:
            problem = csr_problem(tensors["rows"], tensors["cols"], tensors["vals"], full_out, full_in)
        else:
            problem = full_rows_problem(tensors["full_rows"], tensors["full_row_indices"], full_out, full_in)
        if problem:
            raise ValueError(f"{self.modules.get(shard, self.name)}: {problem}. Fix: convert the checkpoint again")
        n_index, k_index, values = coordinates(tensors)
        n_local = self._local("output_dim", self.n, full_out, shard)[n_index]
        k_local = self._local("input_dim", self.k, full_in, shard)[k_index]
        mine = (n_local >= 0) & (k_local >= 0)
        self.entries.append((n_local[mine], k_local[mine], values[mine]))

    def _local(self, dimension: str, size: int, full: int, shard: ShardId) -> Tensor:
        """For each of `full` checkpoint indices its index on this rank, or -1: asked of the layer's own loader."""
        if dimension == "input_dim" and size == full:
            return torch.arange(full, device="cpu")
        probe = Parameter(torch.full((size,), -1, dtype=torch.int64, device="cpu"), requires_grad=False)
        setattr(probe, dimension, 0)
        self._call(probe, torch.arange(full, device="cpu"), shard)
        here = (probe.data >= 0).nonzero().view(-1)
        local = torch.full((full,), -1, dtype=torch.int64, device="cpu")
        local[probe.data[here]] = here
        return local
