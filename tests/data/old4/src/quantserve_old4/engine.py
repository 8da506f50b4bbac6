"""vLLM's side. Only vLLM's own processes import this module, through ``quantserve_old4.register``."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module, Parameter
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs

import quantserve_kernels
from quantserve_kernels import Linear, pack


class Old4Config(QuantizationConfig):
    """vLLM's view of an old4 checkpoint."""

    def get_name(self) -> str:
        """Name of the method."""
        return "old4"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Activations may have any of these dtypes."""
        return [torch.half, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Volta."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the config is part of config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Old4Config:
        """Nothing to read."""
        return cls()

    def get_quant_method(self, layer: Module, prefix: str) -> LinearMethodBase | None:
        """Ours for every linear; None leaves embeddings, lm_head and attention to vLLM."""
        return Old4LinearMethod() if isinstance(layer, LinearBase) else None


class Old4LinearMethod(LinearMethodBase):
    """One linear layer: ``qweight`` uint8 [n, k/2], low half first, and ``scale`` float16 [n, k/64]."""

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
        """Register this rank's parameters; vLLM's loader splits and fuses them along the named dimensions."""
        n, k = sum(output_partition_sizes), input_size_per_partition
        qweight = Parameter(torch.empty(n, k // 2, dtype=torch.uint8), requires_grad=False)
        scale = Parameter(torch.full((n, k // 64), torch.nan, dtype=torch.float16), requires_grad=False)
        set_weight_attrs(qweight, {"output_dim": 0, "input_dim": 1, **extra_weight_attrs})
        set_weight_attrs(scale, {"output_dim": 0, "input_dim": 1, **extra_weight_attrs})
        layer.register_parameter("qweight", qweight)
        layer.register_parameter("scale", scale)

    def process_weights_after_loading(self, layer: Module) -> None:
        """Pack once."""
        codes = torch.stack((layer.qweight & 15, layer.qweight >> 4), dim=-1).flatten(1)  # uint8 [n, k]
        table = torch.arange(-8.0, 8.0, device=codes.device)[None]  # one codebook for all: what code 0..15 means
        layer.kernel = Linear(pack(codes, table, bits=4, scales=layer.scale.data, group_size=64))
        del layer.qweight, layer.scale

    def apply(self, layer: Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` [..., k] to [..., n] in x's dtype."""
        return layer.kernel(x, bias)  # type: ignore[no-any-return]


def register() -> None:
    """Register the config once per process."""
    quantserve_kernels.load()
    if "old4" not in QUANTIZATION_METHODS:
        register_quantization_config("old4")(Old4Config)
