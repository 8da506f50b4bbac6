"""vLLM's side. Only vLLM's own processes import this module, through ``quantserve_rtn8.register``."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Module, Parameter
from torch.nn.functional import linear
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs


class Rtn8Config(QuantizationConfig):
    """vLLM's view of an rtn8 checkpoint; the format has no settings."""

    def get_name(self) -> str:
        """Name of the method."""
        return "rtn8"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Activations may have any of these dtypes."""
        return [torch.half, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU: the arithmetic is plain torch."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the config is part of config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Rtn8Config:
        """Nothing to read."""
        return cls()

    def get_quant_method(self, layer: Module, prefix: str) -> LinearMethodBase | None:
        """Ours for every linear; None leaves embeddings, lm_head and attention to vLLM."""
        return Rtn8LinearMethod() if isinstance(layer, LinearBase) else None


class Rtn8LinearMethod(LinearMethodBase):
    """One linear layer: ``qweight`` int8 [n, k] and ``scale`` float32 [n]."""

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
        qweight = Parameter(torch.empty(n, k, dtype=torch.int8), requires_grad=False)
        scale = Parameter(torch.empty(n, dtype=torch.float32), requires_grad=False)
        set_weight_attrs(qweight, {"output_dim": 0, "input_dim": 1, **extra_weight_attrs})
        set_weight_attrs(scale, {"output_dim": 0, **extra_weight_attrs})
        layer.register_parameter("qweight", qweight)
        layer.register_parameter("scale", scale)

    def apply(self, layer: Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` [..., k] to [..., n] in x's dtype."""
        out = linear(x, layer.qweight.to(x.dtype)) * layer.scale.to(x.dtype)
        return out if bias is None else out + bias


def register() -> None:
    """Register the config once per process."""
    if "rtn8" not in QUANTIZATION_METHODS:
        register_quantization_config("rtn8")(Rtn8Config)
