"""vLLM's side. Only vLLM's own processes import this module, through ``quantserve_rtn8.register``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantserve.api import Scheme
from quantserve_kernels import PackedWeight, pack
from quantserve_kernels.vllm import CSR, Format
from quantserve_rtn8.format import SCHEME

INT8 = torch.tensor([[*range(128), *range(-128, 0)]], dtype=torch.float32)
"""What the bytes of an int8 mean, seen as uint8: the codebook [1, 256]."""


class Rtn8(Format):
    """All linears are stored alike, and the format has no settings."""

    name = "rtn8"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Rtn8:
        """Nothing to read."""
        return cls()

    def scheme(self, module: str) -> Scheme:
        """The same for every linear."""
        return SCHEME

    def pack(self, tensors: Mapping[str, Tensor], sparse: CSR | None) -> PackedWeight:
        """The stored bytes are the codes; a scale per output channel."""
        codes = tensors["qweight"].view(torch.uint8)
        return pack(codes, INT8.to(codes.device), bits=8, scales=tensors["scale"][:, None])
