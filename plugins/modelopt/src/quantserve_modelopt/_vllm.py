"""ModelOpt on vLLM for CPUs, weights only. Only vLLM's own processes import this module.

vLLM itself has no kernel for NVFP4 and MXFP8 on CPUs, and rounds activations of FP8 to 8 bits.
"""

from dataclasses import replace
from typing import Any

import torch
from torch.nn import Module
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.models.utils import WeightsMapper

from quantserve.api import Scheme
from quantserve_kernels import PackedWeight, from_fp4, from_fp8
from quantserve_kernels.vllm import CSR, Format, Tensors
from quantserve_modelopt.format import FILE, MX_GROUP, NAMES, SIDE, Settings, excludes, read, scheme


class ModelOpt(Format):
    """FP8, MXFP8, NVFP4 and mixtures of them; activations keep 16 bits. The KV cache is vLLM's."""

    name = NAMES[0]
    config_files = (FILE,)
    dtypes = (torch.bfloat16, torch.half)
    match = "exact"
    settings: Settings

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ModelOpt":
        """Read the quantization config; ValueError where it is wrong."""
        settings = read(config)
        made = cls(skipped=settings.excluded, modules=settings.layers)
        made.settings = settings
        return made

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take the place of vLLM's other methods for these files, which would claim them after this one."""
        return cls.name if hf_quant_cfg.get("quant_method") in NAMES else None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename what the settings know by name as well."""
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        self.settings = replace(self.settings, layers=self.modules)

    def get_quant_method(self, layer: Module, prefix: str) -> QuantizeMethodBase | None:
        """Of attention vLLM's own, which reads the scales of the KV cache."""
        return BaseKVCacheMethod(self) if isinstance(layer, Attention) else super().get_quant_method(layer, prefix)

    def scheme(self, module: str) -> Scheme | None:
        """By algorithm; None where the list excludes the module. The files tell of those that it misses."""
        algorithm = self.settings.of(module)
        skipped = excludes(self.skipped, module)
        return scheme(algorithm, self.settings.group_size) if algorithm and not skipped else None

    def pack(self, tensors: Tensors, sparse: CSR | None) -> PackedWeight:
        """By what arrived: NVFP4, MXFP8, or FP8 with blocks, channels or a tensor. ``input_scale`` is not used."""
        weight, scales = tensors["weight"], tensors["weight_scale"]
        if weight.dtype == torch.uint8:
            return from_fp4(weight, scales.float() * tensors["weight_scale_2"].reshape(-1, 1))
        if scales.dtype == torch.uint8:
            return from_fp8(weight, scales.view(torch.float8_e8m0fnu).float(), (1, MX_GROUP))
        return from_fp8(weight, scales[:, 0, :, 0], (SIDE, SIDE)) if scales.ndim == 4 else from_fp8(weight, scales)
