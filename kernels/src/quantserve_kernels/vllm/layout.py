"""How the parts of a scheme lie in the parameters of one rank's layer, and whether the ranks may cut them so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, lcm
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    ModelWeightParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)

from quantserve_kernels.vllm.scheme import Part, Scheme, dims


@dataclass(frozen=True)
class Layout:
    """How a part lies in a parameter. Flattened N x K elements are a matrix here, so that both can be cut.

    Attributes:
        shape: for one linear [n, k].
        n_dim, k_dim: the dimensions that grow with N and K, or None.
        n_per: out_features for each index of `n_dim`.
        flat: whether the file has `n_dim` and `k_dim` as one dimension.
    """

    shape: tuple[int, ...]
    n_dim: int | None
    k_dim: int | None
    n_per: Fraction
    flat: bool

    @classmethod
    def of(cls, part: Part, n: int, k: int) -> Layout:
        """The layout of a part that is not ragged in a linear [n, k]."""
        axes: list[tuple[str, Fraction]] = []
        for one in part.shape:
            if one is None or isinstance(one, int):
                axes.append(("", Fraction(one or 0)))
            elif one.axis in ("n", "k", "nk"):
                axes += [("n", Fraction(1)), ("k", one.per)] if one.axis == "nk" else [(one.axis, one.per)]
            else:
                raise NotImplementedError(f"a part of the scheme grows with {one.axis!r}; linears have n, k and nk")
        names = [axis for axis, _ in axes]
        elements = {"n": n, "k": k}
        return cls(
            shape=tuple(ceil(elements[axis] / per) if axis else int(per) for axis, per in axes),
            n_dim=names.index("n") if "n" in names else None,
            k_dim=names.index("k") if "k" in names else None,
            n_per=dict(axes).get("n", Fraction(1)),
            flat=any(dim.axis == "nk" for dim in dims(part)),
        )

    def parameter(self, data: Tensor, loader: Callable[..., None]) -> Parameter:
        """A parameter of the class with which vLLM cuts and fuses such tensors."""
        if self.n_dim is None:
            return Parameter(data, requires_grad=False)
        keys = {"data": data, "output_dim": self.n_dim, "weight_loader": loader}
        if self.k_dim is not None:
            keys["input_dim"] = self.k_dim
        if self.n_per == 1:
            return ChannelQuantScaleParameter(**keys) if self.k_dim is None else ModelWeightParameter(**keys)
        packed = PackedColumnParameter if self.k_dim is None else PackedvLLMParameter
        return packed(packed_factor=self.n_per, packed_dim=self.n_dim, **keys)

    def in_scheme(self, tensor: Tensor, n_parts: Sequence[int]) -> Tensor:
        """A parameter's data in the part's own shape; where that has no N, once for each out_feature of `n_parts`."""
        if self.n_dim is not None:
            return tensor.flatten(self.n_dim, self.n_dim + 1) if self.flat else tensor
        rows = [one.expand(n, *self.shape) for one, n in zip(tensor, n_parts, strict=True)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


def check_cut(scheme: Scheme, axis: Literal["n", "k"], full: int, shares: Sequence[int], what: str) -> None:
    """Refuse a rank's share, or a module of a fused layer, that splits what a format keeps together.

    Args:
        scheme: of the layer.
        axis: which features.
        full: how many there are over all ranks.
        shares: how many of them this rank has, for each module.
        what: the layer and its format, for the message.

    Raises:
        ValueError: names them, with the numbers.
    """
    cut = [full] != list(shares)
    together = [
        dim.per.numerator
        for suffix in scheme.parts
        for dim in dims(scheme.alternatives(suffix)[0])
        if (dim.axis == axis and (cut or not dim.partial)) or (dim.axis == "nk" and axis == "k")
    ]
    multiple = lcm(*together)
    odd = [share for share in shares if share % multiple]
    if not odd:
        return
    features, ranks = "in_features" if axis == "k" else "out_features", max(1, full // sum(shares))
    if ranks == 1:
        raise ValueError(
            f"{what} needs {features} in multiples of {multiple}, but they are {odd[0]}. "
            "Fix: config.json and the tensors must come from the same model"
        )
    raise ValueError(
        f"{what} needs {features} per rank in multiples of {multiple}, but {odd[0] * ranks} over {ranks} ranks is "
        f"{odd[0]}. Fix: a smaller tensor_parallel_size"
    )
