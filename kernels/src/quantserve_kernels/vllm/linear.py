"""The linear method of every format: parameters from its scheme, then packed codes and the kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method

from quantserve_kernels import Linear, PackedWeight, check_bias
from quantserve_kernels.vllm.loading import LayerLoading, float32_by_default
from quantserve_kernels.vllm.scheme import Scheme

if TYPE_CHECKING:
    from quantserve_kernels.vllm.format import Format


@contextmanager
def blaming(layer: Module, fix: str) -> Iterator[None]:
    """Check a layer's bias and pack its weight: what is wrong with either is an error of this layer.

    Raises:
        ValueError: the bias is not finite, or the block raised one; names the layer and the fix.
    """
    try:
        check_bias(getattr(layer, "bias", None))
        yield
    except ValueError as error:
        raise ValueError(f"{getattr(layer, 'prefix', '') or type(layer).__name__}: {error}. Fix: {fix}") from error


def install(weight: PackedWeight, layer: Module, name: str) -> None:
    """Compute a layer with this weight, whose codes are the buffer `name` from now on.

    vLLM's LoRA wrapper asks ``qweight`` or ``weight_packed`` for the layer's device, and does not wrap a layer without.
    """
    layer.kernel = Linear(weight)
    layer.register_buffer(name, layer.kernel.codes, persistent=False)


@register_weight_loader_v2_supported_method
class FormatLinearMethod(LinearMethodBase):
    """One layer of a format.

    Args:
        format: whose `pack` makes the kernel's weight.
        scheme: of all of the layer's modules.
        modules: the checkpoint's modules that are fused into the layer, in this order.
    """

    def __init__(self, format: Format, scheme: Scheme, modules: Sequence[str]) -> None:
        self.format, self.scheme, self.modules = format, scheme, modules

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Any,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register a parameter for each part of the scheme.

        Raises:
            ValueError: this rank's share splits a word or a group of the format.
        """
        layer.format_loading = LayerLoading(
            self.format,
            self.scheme,
            layer,
            self.modules,
            output_partition_sizes,
            input_size_per_partition,
            weight_loader,
        )

    def process_weights_after_loading(self, layer: Module) -> None:
        """Check that everything arrived and pack it for the kernel, which takes the place of the loaded tensors.

        `qweight` is the packed codes from then on.

        Raises:
            ValueError: a tensor of this layer never arrived, or holds what no weight can be; names it.
        """
        engine = get_current_vllm_config_or_none()
        dummy = engine is not None and engine.load_config.load_format == "dummy"
        loading: LayerLoading = layer.format_loading
        tensors, sparse = loading.finish(verify=not dummy)
        with blaming(layer, "convert the checkpoint again"), float32_by_default():
            packed = self.format.pack_as(self.scheme, tensors, sparse)
            weight, order = packed if isinstance(packed, tuple) else (packed, None)
            if (weight.n, weight.k) != (loading.n, loading.k):
                raise ValueError(f"packed [{weight.n}, {weight.k}], but the layer is [{loading.n}, {loading.k}]")
        del layer.format_loading
        layer.register_buffer("input_order", order, persistent=False)
        install(weight, layer, "qweight")

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` [..., k] to [..., n] in x's dtype."""
        out: Tensor = layer.kernel(x if layer.input_order is None else x.index_select(-1, layer.input_order), bias)
        return out

    def tie_weights(self, layer: Module, embed_tokens: Module) -> Module:
        """Refuse: a quantized output layer has no weight to share.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"config.json ties {self.modules[0]} to the embedding, but the checkpoint holds it quantized. "
            "Fix: set tie_word_embeddings to false"
        )
