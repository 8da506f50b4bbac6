"""bitsandbytes on vLLM. Only vLLM's own processes import this module."""

import json
from typing import Any

import torch
from torch import Tensor

from quantserve_bitsandbytes.format import BLOCK, NESTED, Settings, engine, settings
from quantserve_kernels import PackedWeight, from_nf4, pack
from quantserve_kernels.vllm import CSR, Format, Tensors
from quantserve_kernels.vllm.scheme import Scheme


class Bitsandbytes(Format):
    """NF4, FP4 and int8 weights as transformers saves them, multiplied with 16-bit activations.

    What the files hold unquantized is plain, whatever `llm_int8_skip_modules` says.
    """

    name = "bitsandbytes"
    ignored = (".weight_format",)
    settings: Settings

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Bitsandbytes":
        """Read the quantization config; ValueError where it is not served."""
        made = cls()
        try:
            made.settings = settings(config)
        except ValueError as error:
            raise ValueError(f"bitsandbytes: {error}. Fix: save the quantized model again") from None
        return made

    def scheme(self, module: str) -> Scheme:
        """The same for every quantized linear."""
        return engine(self.settings)

    def arrange(self, suffix: str, tensor: Tensor, scheme: Scheme, shape: tuple[int, int]) -> Tensor:
        """Bytes of the storage dtype, an absmax of the second quantization for each block, and its offset."""
        if suffix == "weight" and self.settings.kind != "int8":
            return tensor.contiguous().view(torch.uint8).reshape(-1, 1)
        if suffix == "weight.nested_absmax":
            return tensor.repeat_interleave(NESTED)[: shape[0] * shape[1] // BLOCK]
        return _offset(tensor, shape) if suffix == self.settings.state else tensor

    def pack_as(self, scheme: Scheme, tensors: Tensors, sparse: CSR | None) -> PackedWeight:
        """The table of the file, or that of int8, times absmax."""
        weight = tensors["weight"]
        if self.settings.kind == "int8":
            values = torch.arange(256, dtype=torch.uint8, device=weight.device).view(torch.int8).float()
            return pack(weight.view(torch.uint8), values[None], bits=8, scales=tensors["SCB"][:, None] / 127)
        tables = tensors["weight.quant_map"]
        if not torch.equal(tables, tables[:1].expand_as(tables)):
            raise ValueError("the modules of a fused layer have different quant_maps")
        n = tables.shape[0]
        absmax = tensors["weight.absmax"].view(n, -1)
        if self.settings.double:
            scale, values = tensors["weight.nested_absmax"].view(n, -1), tensors["weight.nested_quant_map"]
            absmax = values.gather(1, absmax.long()) * scale + tensors[self.settings.state]
        return from_nf4(weight, absmax, (n, weight.numel() * 2 // n), tables[0])


def _offset(state: Tensor, shape: tuple[int, int]) -> Tensor:
    """The offset of absmax in a quant_state, whose block size and shape must be those that are served."""
    try:
        values = json.loads(bytes(state.tolist()))
        block, stored, offset = values["blocksize"], values["shape"], float(values.get("nested_offset", 0))
        nested = values.get("nested_blocksize", NESTED)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is not the JSON that bitsandbytes writes: {error}") from None
    if (block, nested) != (BLOCK, NESTED) or list(stored) != list(shape):
        raise ValueError(
            f"blocks of {block} and {nested}, shape {stored}; served are {BLOCK} and {NESTED}, here {list(shape)}"
        )
    return torch.tensor([offset])
