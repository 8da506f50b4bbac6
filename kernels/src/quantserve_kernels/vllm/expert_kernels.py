"""The kernels for the experts of vLLM's own AWQ, GPTQ, AutoRound and compressed-tensors methods on CPUs.

vLLM 0.32 has kernels for 4-bit experts on CPUs with AMX only. `register` puts a layer for experts into vLLM's registry
of pluggable layers: its experts are computed here wherever vLLM chooses `CodebookLinearKernel` for their linears.
Others keep vLLM's method.
"""

from __future__ import annotations

from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEMethodBase
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.inc import INCConfig

from quantserve_kernels.vllm.experts import experts_method
from quantserve_kernels.vllm.linear_kernels import serves

CONFIGS = (AutoAWQConfig, AutoGPTQConfig, INCConfig, CompressedTensorsConfig)


class RoutedExperts(fused_moe.RoutedExperts):
    """vLLM's layer under its own name, which compressed-tensors looks layers up by."""

    def _get_quant_method(
        self, prefix: str, quant_config: QuantizationConfig | None, moe_config: FusedMoEConfig
    ) -> FusedMoEMethodBase:
        method = None
        try:
            if isinstance(quant_config, CONFIGS):
                method = experts_method(self, prefix, quant_config, serves)
        except (ValueError, NotImplementedError):
            if not isinstance(quant_config, CompressedTensorsConfig):
                raise
            # It has schemes that vLLM knows for experts and not for linears. If this is none, vLLM raises, too.
            return super()._get_quant_method(prefix, quant_config, moe_config)
        return method or super()._get_quant_method(prefix, quant_config, moe_config)


def register() -> None:
    """Use this layer for experts in this process. Safe to call again."""
    if "RoutedExperts" not in op_registry_oot:
        PluggableLayer.register_oot(RoutedExperts, name="RoutedExperts")
