"""From checkpoint tensors to one rank's part of a (perhaps fused) vLLM layer.

vLLM hands over whole checkpoint tensors one by one: q_proj's, then k_proj's, in any order. Its own parameter classes
cut those that grow with N; the others are kept for each module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from quantserve_kernels.vllm.layout import Layout, check_cut
from quantserve_kernels.vllm.ragged import CSR, Ragged
from quantserve_kernels.vllm.scheme import Scheme, common_dtype, dtypes
from quantserve_kernels.vllm.shards import Loader, ShardId, Shards

if TYPE_CHECKING:
    from quantserve_kernels.vllm.format import Format


@contextmanager
def float32_by_default() -> Iterator[None]:
    """While a format's code runs: vLLM makes its dtype the default, and a table made without one would be rounded."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def attribute(suffix: str) -> str:
    """What the parameter of a suffix is called, as no parameter's name has a dot."""
    return suffix.replace(".", "_")


class LayerLoading:
    """What one layer has received so far, and how to receive more.

    Args:
        format: whose tensors they are.
        scheme: of each of the layer's modules.
        layer: the vLLM layer; gets a parameter for each part of the scheme.
        modules: the checkpoint's modules that are fused into it, in this order.
        n_parts: out_features of what vLLM fuses, on this rank.
        k: in_features of this rank.
        loader: the layer's own weight loader.

    Attributes:
        name: the layer's dotted name in the engine's model.
        n: out_features of this rank.

    Raises:
        ValueError: this rank's share splits a word or a group of the format.
    """

    def __init__(
        self,
        format: Format,
        scheme: Scheme,
        layer: Module,
        modules: Sequence[str],
        n_parts: Sequence[int],
        k: int,
        loader: Loader,
    ) -> None:
        self.format, self.scheme, self.layer = format, scheme, layer
        self.shards = Shards(layer, modules, len(n_parts), loader)
        self.name = self.shards.name
        self.n_parts, self.n, self.k = n_parts, sum(n_parts), k
        self.received: dict[ShardId, set[str]] = {shard: set() for shard in self.shards.modules}
        self.stored: dict[str, set[torch.dtype]] = {}  # dtypes as they arrived
        self.layouts: dict[str, Layout] = {}
        self.names: list[str] = []  # of the parameters
        self.ragged = Ragged(format, self.shards, self.n, k)
        what = f"{self.name}: {scheme.bits:g}-bit {format.name}"
        check_cut(scheme, "k", self.shards.k, [k], what)
        check_cut(scheme, "n", int(layer.output_size), n_parts, what)
        ragged = {suffix for names in format.ragged for suffix in names}
        for suffix in scheme.parts:
            part = scheme.alternatives(suffix)[0]
            if suffix in ragged:
                empty = torch.empty(0, dtype=common_dtype(scheme, suffix))
                self._register(suffix, Parameter(empty, requires_grad=False))
            elif None not in part.shape:
                layout = self.layouts[suffix] = Layout.of(part, self.n, k)
                shape = layout.shape if layout.n_dim is not None else (len(n_parts), *layout.shape)
                self._register(suffix, layout.parameter(self._unloaded(suffix, shape), self.shards.loader))

    def finish(self, verify: bool = True) -> tuple[dict[str, Tensor], CSR | None]:
        """End the loading: the tensors by suffix, in the scheme's shapes, and this rank's sparse entries.

        Args:
            verify: whether everything must have arrived; not when vLLM fills the parameters by itself.

        Raises:
            ValueError: a tensor the layer needs never came; names it.
        """
        missing = self._missing() if verify else []
        if missing:
            raise ValueError(
                f"{self.name}: the checkpoint lacks {', '.join(missing)}; the layer would compute garbage. "
                "Fix: download or convert the checkpoint again (`quantserve check` lists everything it lacks)"
            )
        tensors = {}
        for suffix, layout in self.layouts.items():
            if suffix in self.stored or not self.scheme.alternatives(suffix)[0].optional:
                tensor, stored = getattr(self.layer, attribute(suffix)).data, self.stored.get(suffix, set())
                tensors[suffix] = layout.in_scheme(tensor.to(*stored) if len(stored) == 1 else tensor, self.n_parts)
        for name in self.names:
            delattr(self.layer, name)
        return tensors, self.ragged.csr(next(iter(tensors.values())).device)

    def _register(self, suffix: str, parameter: Parameter) -> None:
        def load(parameter: Parameter, tensor: Tensor, shard: ShardId = None) -> None:
            tensor = self._checked(suffix, tensor, shard)
            if suffix not in self.layouts:
                self.ragged.add(suffix, tensor, shard)
            elif self.layouts[suffix].n_dim is None:
                self._place_for_each(suffix, parameter, tensor, shard)
            else:
                self._place(suffix, parameter, tensor, shard)
            for one in self.shards.ids(shard):
                self.received[one].add(suffix)
            self.stored.setdefault(suffix, set()).add(tensor.dtype)

        parameter.weight_loader = load
        self.names.append(attribute(suffix))
        self.layer.register_parameter(attribute(suffix), parameter)

    def _unloaded(self, suffix: str, shape: tuple[int, ...]) -> Tensor:
        """Floats are NaN until they are loaded, so that what vLLM leaves out is noticed when the layer is packed."""
        dtype = common_dtype(self.scheme, suffix)
        return torch.full(shape, float("nan") if dtype.is_floating_point else 0, dtype=dtype)

    def _checked(self, suffix: str, tensor: Tensor, shard: ShardId) -> Tensor:
        """The tensor in the shape of its part's first alternative, with flattened n x k elements as a matrix."""
        name, parts = f"{self.shards.module(shard)}.{suffix}", self.scheme.alternatives(suffix)
        known = dtypes(self.scheme, suffix)
        n, k = self.shards.n(shard), self.shards.k
        if n is not None:
            try:
                with float32_by_default():
                    tensor = self.format.arrange(suffix, tensor, self.scheme, (n, k))
            except ValueError as error:
                raise ValueError(f"{name}: {error}. Fix: the quantization config must be that of these files") from None
        if tensor.dtype not in known:
            expected = " or ".join(map(str, known))
            raise ValueError(f"{name} is {tensor.dtype}, expected {expected}. Fix: convert the checkpoint again")
        if suffix not in self.layouts or n is None:
            return tensor
        if not any(part.fits(tuple(tensor.shape), n, k) for part in parts):
            expected = " or ".join(str(list(part.sizes(n, k))) for part in parts)
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected {expected} for {self.scheme.bits:g} bits, "
                f"out_features {n} and in_features {k}. Fix: the quantization config, config.json and the tensors must "
                "come from the same model"
            )
        shape = Layout.of(parts[0], n, k).shape
        if tensor.numel() == prod(shape):
            return tensor.reshape(shape)
        if tensor.numel() == 1:
            return tensor.reshape(()).expand(shape)
        raise NotImplementedError(f"{name} has shape {list(tensor.shape)}, which cannot stand for {list(shape)}")

    def _place(self, suffix: str, parameter: Parameter, tensor: Tensor, shard: ShardId) -> None:
        try:
            self.shards.load(parameter, tensor, shard)
        except (AssertionError, RuntimeError, IndexError) as error:
            raise ValueError(
                f"{self.shards.module(shard)}.{suffix}: shape {list(tensor.shape)} does not fit the layer {self.name} "
                f"(this rank: in_features {self.k}, out_features {self.n}). "
                "Fix: config.json and the tensors must come from the same model"
            ) from error

    def _place_for_each(self, suffix: str, parameter: Parameter, tensor: Tensor, shard: ShardId) -> None:
        """Place a part without N: it belongs to one of the fused modules, or to all that the file has as one."""
        k_dim, ids = self.layouts[suffix].k_dim, list(self.shards.modules)
        if k_dim is not None and self.k < self.shards.k:
            size = self.layouts[suffix].shape[k_dim]
            tensor = tensor.narrow(k_dim, self.layer.tp_rank * size, size)
        for one in self.shards.ids(shard):
            parameter.data[ids.index(one)].copy_(tensor)

    def _missing(self) -> list[str]:
        missing = []
        for shard, module in self.shards.modules.items():
            got = self.received[shard]
            wanted = {*self.scheme.required(), *self.format.promised(module)}
            wanted |= self.stored.keys() & self.layouts.keys()  # an optional part that came for another module
            wanted |= {name for names in self.format.ragged if got & set(names) for name in names}
            missing += [f"{module}.{suffix}" for suffix in self.scheme.parts if suffix in wanted - got]
        return list(dict.fromkeys(missing))
