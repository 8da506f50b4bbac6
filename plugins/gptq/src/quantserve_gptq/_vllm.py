"""GPTQ on vLLM for what vLLM's own GPTQ does not serve. Only vLLM's own processes import this module."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from torch.nn import Module

from quantserve.api import Scheme
from quantserve_gptq._packing import pack_linear
from quantserve_gptq.config import FILE_NAME, NAMES, Settings, Written, config_findings
from quantserve_kernels.vllm import CSR, Format, Packed, Tensors
from quantserve_kernels.vllm.linear import FormatLinearMethod


class Gptq(Format):
    """2, 3, 4 and 8 bits, symmetric or not, of either version, with rules for modules and with act-order."""

    name = "gptq_codebook"
    config_files = (FILE_NAME,)
    written: Written
    settings: Settings | None
    """Of the layer that is packed; of the whole config for experts."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Gptq:
        """Read the quantization config; ValueError where it is wrong."""
        made = cls()
        made.written = Written("the quantization config", config)
        if found := config_findings(made.written):
            raise ValueError(f"gptq: {found[0].message}. Fix: {found[0].fix}")
        made.settings = made.written.of("")
        return made

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take files that declare GPTQ where the engine's argument asks for this format."""
        declared = str(hf_quant_cfg.get("quant_method", "")).lower()
        return cls.name if user_quant == cls.name and declared in NAMES else None

    def scheme(self, module: str) -> Scheme | None:
        """The rules of the config decide."""
        settings = self.written.of(module)
        return settings.scheme if settings else None

    def get_quant_method(self, layer: Module, prefix: str) -> Any:
        """The method of a layer knows the layer's settings.

        Raises:
            ValueError: the modules of a fused layer have different settings.
        """
        method = super().get_quant_method(layer, prefix)
        if not isinstance(method, FormatLinearMethod):
            return method
        settings = {self.written.of(module) for module in method.modules}
        if len(settings) > 1:
            raise ValueError(
                f"{prefix} is one fused layer, but {', '.join(method.modules)} are quantized differently: "
                f"{'; '.join(map(str, settings))}. Fix: quantize all of them in the same way"
            )
        one = copy(self)
        one.settings = settings.pop()
        return FormatLinearMethod(one, method.scheme, method.modules)

    def pack(self, tensors: Tensors, sparse: CSR | None) -> Packed:
        """Pack a layer; with act-order the weight and the order of its inputs."""
        assert self.settings is not None
        return pack_linear(
            tensors["qweight"],
            tensors["qzeros"],
            tensors["scales"],
            tensors.get("g_idx"),
            bits=self.settings.bits,
            sym=self.settings.sym,
            zero_offset=self.written.zero_offset,
        )
