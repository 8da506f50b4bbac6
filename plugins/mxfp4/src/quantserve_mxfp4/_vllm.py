"""MXFP4 on vLLM for CPUs, weights only. Only vLLM's own processes import this module.

vLLM's own kernel for MXFP4 experts on CPUs needs AMX.
"""

from typing import Any

import torch

from quantserve.api import Scheme
from quantserve_kernels import PackedWeight, from_fp4
from quantserve_kernels.vllm import CSR, Format, Tensors
from quantserve_mxfp4.format import DECLARED, SCHEME, is_stack


class Mxfp4(Format):
    """The experts of gpt-oss; all other linears are plain, as in vLLM's own method."""

    name = "mxfp4"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Mxfp4":
        """Nothing is read: the config's patterns of unquantized modules name no experts."""
        return cls()

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take the place of vLLM's ``gpt_oss_mxfp4``, which would claim these files after this method."""
        return cls.name if hf_quant_cfg.get("quant_method") in DECLARED else None

    def scheme(self, module: str) -> Scheme | None:
        """None for whatever is no expert."""
        return SCHEME if is_stack(module) else None

    def pack(self, tensors: Tensors, sparse: CSR | None) -> PackedWeight:
        """The kernel keeps scales in bfloat16, which holds every power of two that E8M0 has; its NaN is refused."""
        scales = tensors["scales"].view(torch.float8_e8m0fnu).bfloat16()
        return from_fp4(tensors["blocks"].flatten(1), scales)
