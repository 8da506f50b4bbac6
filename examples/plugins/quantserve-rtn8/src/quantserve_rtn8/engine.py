"""vLLM's side. Only vLLM's own processes import this module, through ``quantserve_rtn8.register``."""

import torch

from quantserve.api import Scheme
from quantserve_kernels import PackedWeight, pack
from quantserve_kernels.vllm import CSR, Format, Tensors
from quantserve_rtn8.format import SCHEME


class Rtn8(Format):
    """All linears are stored alike, and the format has no settings."""

    name = "rtn8"

    def scheme(self, module: str) -> Scheme:
        """The same for every linear."""
        return SCHEME

    def pack(self, tensors: Tensors, sparse: CSR | None) -> PackedWeight:
        """The codes are the stored bytes, whose values are those of int8; a scale per output channel."""
        codes = tensors["qweight"].view(torch.uint8)
        values = torch.arange(256, dtype=torch.uint8, device=codes.device).view(torch.int8).float()
        return pack(codes, values[None], bits=8, scales=tensors["scale"][:, None])
