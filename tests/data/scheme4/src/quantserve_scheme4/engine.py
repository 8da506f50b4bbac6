"""vLLM's side. Only vLLM's own processes import this module, through ``quantserve_scheme4.register``."""

import torch

from quantserve.api import Scheme
from quantserve_kernels import PackedWeight, pack
from quantserve_kernels.vllm import CSR, Format, Tensors
from quantserve_scheme4.plugin import SCHEME


class Scheme4(Format):
    """All linears are stored alike."""

    name = "scheme4"

    def scheme(self, module: str) -> Scheme:
        """The same for every linear."""
        return SCHEME

    def pack(self, tensors: Tensors, sparse: CSR | None) -> PackedWeight:
        """The lower half of a byte first; a code stands for itself less 8."""
        words = tensors["qweight"]
        codes = torch.stack((words & 15, words >> 4), dim=-1).flatten(1)
        table = torch.arange(-8.0, 8.0, device=codes.device)[None]
        return pack(codes, table, bits=4, scales=tensors["scale"], group_size=64)
