"""AWQ in vLLM on quantserve's CPU kernels. Written against vLLM 0.32.

vLLM's own AWQ method keeps its name, so that another model in the process, or a plain `vllm serve`, is served as ever;
this one is asked for by a name of its own, `quantization="quantserve_awq"`, for the same checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.auto_awq import (
    AutoAWQConfig,
    AutoAWQMarlinLinearMethod,
    BaseAWQLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from quantserve_awq.kernel import KERNEL_METHOD
from quantserve_kernels import Linear, check_bias, from_awq, load

PARTS = ("qweight", "qzeros", "scales")


class KernelAWQConfig(AutoAWQConfig):
    """vLLM's AWQ config; its quantized linears go to `KernelAWQLinearMethod`, everything else stays vLLM's."""

    @classmethod
    def get_name(cls) -> str:
        """Name of the method."""
        return KERNEL_METHOD

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take AWQ checkpoints, and only where this method was asked for by name."""
        declared = str(hf_quant_cfg.get("quant_method") or "").lower()
        return KERNEL_METHOD if user_quant == KERNEL_METHOD and declared in ("awq", "") else None

    def get_quant_method(self, layer: Module, prefix: str) -> QuantizeMethodBase | None:
        """Our method wherever vLLM uses its linear one; files with ``zero_point: false`` store zeros too, all 8."""
        theirs: QuantizeMethodBase | None = super().get_quant_method(layer, prefix)
        if isinstance(theirs, AutoAWQMarlinLinearMethod):
            return KernelAWQLinearMethod(self, prefix)
        return theirs


@register_weight_loader_v2_supported_method
class KernelAWQLinearMethod(BaseAWQLinearMethod):
    """One linear layer: loaded as vLLM loads AWQ, then packed for the kernel."""

    def __init__(self, config: KernelAWQConfig, name: str) -> None:
        super().__init__(config)
        self.name = name

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register `qweight` and `qzeros` int32 and `scales` float32, which no scale has to be rounded for.

        Raises:
            ValueError: this rank's share splits a group or a word.
        """
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            torch.float32,
            **extra_weight_attrs,
        )
        layer.scales.data.fill_(float("nan"))  # what no tensor arrives for is noticed when the layer is packed

    def process_weights_after_loading(self, layer: Module) -> None:
        """Pack the loaded tensors for the kernel, which takes their place; `qweight` is the packed codes from then on.

        Raises:
            ValueError: scales never arrived, or scales or the bias are not finite; names the layer.
        """
        try:
            check_bias(getattr(layer, "bias", None))
            weight = from_awq(layer.qweight.data, layer.qzeros.data, _stored(layer.scales.data))
        except ValueError as error:
            raise ValueError(
                f"{self.name}: {error}. Fix: download or export the checkpoint again (`quantserve check` lists what it "
                "lacks)"
            ) from error
        for name in PARTS:
            delattr(layer, name)
        layer.kernel = Linear(weight)
        # vLLM's LoRA wrapper asks a quantized layer's `qweight` for its device, and does not wrap a layer without.
        layer.register_buffer("qweight", layer.kernel.codes, persistent=False)

    def apply(self, layer: Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x` [..., k] to [..., n] in x's dtype."""
        out: torch.Tensor = layer.kernel(x, bias)
        return out


def _stored(scales: torch.Tensor) -> torch.Tensor:
    """The scales in the 16-bit dtype they came from, where that is one."""
    for dtype in (torch.float16, torch.bfloat16):
        narrow = scales.to(dtype)
        if torch.equal(narrow.to(torch.float32), scales):
            return narrow
    return scales


def register() -> None:
    """Register the operators and the config with this process's vLLM, on CPUs; idempotent."""
    from vllm.model_executor.layers.quantization import _CUSTOMIZED_METHOD_TO_QUANT_CONFIG
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return  # vLLM's own kernels are the fast ones there
    load()
    if _CUSTOMIZED_METHOD_TO_QUANT_CONFIG.get(KERNEL_METHOD) is not KernelAWQConfig:
        register_quantization_config(KERNEL_METHOD)(KernelAWQConfig)
