"""FP8 on vLLM for CPUs, weights only. Only vLLM's own processes import this module.

vLLM's own kernels for FP8 on CPUs need AMX, or round activations to 8 bits as well.
"""

from typing import Any

import torch

from quantserve.api import Scheme
from quantserve_fp8.format import block_of, scheme, skipped
from quantserve_kernels import PackedWeight, from_fp8
from quantserve_kernels.vllm import CSR, Format, Tensors


class Fp8(Format):
    """E4M3 values with a scale for a tensor, an output channel or a block; activations stay as they are."""

    name = "fp8"
    dtypes = (torch.bfloat16, torch.half, torch.float32)
    match = "exact"
    block: tuple[int, int] | None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Fp8":
        """Read the quantization config; ValueError where its block size is none."""
        made = cls(skipped=skipped(config))
        made.block = block_of(config)
        return made

    def scheme(self, module: str) -> Scheme:
        """The same for every linear."""
        return scheme(self.block)

    def pack(self, tensors: Tensors, sparse: CSR | None) -> PackedWeight:
        """The scales of activations, if there are any, are not used."""
        scales = tensors["weight_scale_inv" if self.block else "weight_scale"]
        return from_fp8(tensors["weight"], scales, self.block)
