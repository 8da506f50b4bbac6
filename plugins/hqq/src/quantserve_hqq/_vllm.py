"""HQQ on vLLM. Only vLLM's own processes import this module."""

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from quantserve_hqq.format import PER_WORD, SETTINGS, engine, entries, entry, settings
from quantserve_kernels import PackedWeight, pack
from quantserve_kernels.vllm import CSR, Format, Tensors
from quantserve_kernels.vllm.scheme import Scheme


class Hqq(Format):
    """Codes of 2, 3, 4 or 8 bits with a scale and a zero for each group, as hqq and transformers save them."""

    name = "hqq"
    ignored = tuple(f".{name}" for name in SETTINGS)
    config: dict[str, Any]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Hqq":
        """Keep the config, whose entries are per kind of linear; ValueError where one is not served."""
        for where, value in entries(config).items():
            try:
                settings(value)
            except ValueError as error:
                raise ValueError(f"hqq: {where}: {error}. Fix: `quantserve check` explains it") from None
        made = cls()
        made.config = config
        return made

    def scheme(self, module: str) -> Scheme | None:
        """By the kind of linear."""
        value = entry(self.config, module)
        return None if value is None else engine(settings(value))

    def arrange(self, suffix: str, tensor: Tensor, scheme: Scheme, shape: tuple[int, int]) -> Tensor:
        """Codes along K instead of hqq's words of distant groups."""
        if suffix != "W_q":
            return tensor
        bits, (n, k) = int(scheme.bits), shape
        group = scheme.group_size if scheme.group_size > 0 else k
        words = tensor.contiguous().view(torch.int32 if bits == 3 else torch.uint8)
        expected = [-(-n * k // group // PER_WORD[bits]), group]
        if list(words.shape) != expected or n * k % group:
            raise ValueError(f"{bits} bits have words {list(words.shape)}, expected {expected} for [{n}, {k}]")
        steps = range(PER_WORD[bits] - 1, -1, -1)
        codes = torch.cat([((words >> bits * step) & (2**bits - 1)).to(torch.uint8) for step in steps])
        codes = codes[: n * k // group].view(n, k)
        width = 4 if bits == 3 else bits
        parts = codes.view(n, -1, 8 // width).unbind(-1)
        return reduce(torch.bitwise_or, [part << at * width for at, part in enumerate(parts)])

    def pack_as(self, scheme: Scheme, tensors: Tensors, sparse: CSR | None) -> PackedWeight:
        """(code - zero) * scale."""
        octets, bits = tensors["W_q"], int(scheme.bits)
        width = 4 if bits == 3 else bits
        n, k = octets.shape[0], octets.shape[1] * 8 // width

        def channels(first: int, last: int) -> Tensor:
            part = octets[first:last]
            return torch.stack([part >> at & 2**width - 1 for at in range(0, 8, width)], dim=-1).reshape(-1, k)

        return pack(
            channels,
            torch.arange(2**bits, dtype=torch.float32, device=octets.device)[None],
            bits=bits,
            shape=(n, k),
            scales=tensors["scale"].view(n, -1),
            zeros=tensors["zero"].view(n, -1),
            group_size=scheme.group_size,
        )
