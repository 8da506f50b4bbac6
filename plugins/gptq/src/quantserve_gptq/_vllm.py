"""GPTQ on vLLM for what vLLM's own GPTQ does not serve. Only vLLM's own processes import this module."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from torch import Tensor
from torch.nn import Module

from quantserve.api import Scheme
from quantserve_gptq._packing import pack_linear
from quantserve_gptq.config import FILE_NAME, NAMES, Settings, Written, config_findings
from quantserve_gptq.format import gptq_scheme
from quantserve_kernels import PackedWeight
from quantserve_kernels.vllm import CSR, Format, Tensors
from quantserve_kernels.vllm.linear import FormatLinearMethod


class Gptq(Format):
    """2, 3, 4 and 8 bits, symmetric or not, of either version, with rules for modules and with act-order."""

    name = "gptq_codebook"
    config_files = (FILE_NAME,)
    written: Written
    settings: Settings | None
    """Of the layer that is packed; of the whole config for experts."""
    order: Tensor | None = None
    """Of the inputs of the layer that was packed; see `pack_linear`."""
    reorders = False
    """Whether the layer that is packed can put its inputs in order."""

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
        return gptq_scheme(settings.bits, settings.group_size) if settings else None

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
        one.settings, one.reorders = settings.pop(), True
        return GptqLinearMethod(one, method.scheme, method.modules)

    def pack(self, tensors: Tensors, sparse: CSR | None) -> PackedWeight:
        """Pack a layer, and keep the order of its inputs."""
        assert self.settings is not None
        g_idx = tensors.get("g_idx")  # [n, k]: one row for each of the fused modules, repeated
        if g_idx is not None:
            if not bool((g_idx == g_idx[:1]).all()):
                raise ValueError("the modules of this fused layer have inputs in different orders (g_idx)")
            g_idx = g_idx[0]
        weight, self.order = pack_linear(
            tensors["qweight"],
            tensors["qzeros"],
            tensors["scales"],
            g_idx,
            bits=self.settings.bits,
            sym=self.settings.sym,
            zero_offset=self.written.zero_offset,
        )
        if self.order is not None and not self.reorders:
            raise ValueError("experts with act-order (desc_act) are not served: each has inputs in an order of its own")
        return weight


class GptqLinearMethod(FormatLinearMethod):
    """Puts the inputs in order before the kernel, where act-order scattered the groups."""

    format: Gptq

    def process_weights_after_loading(self, layer: Module) -> None:
        """Pack the layer; ValueError as in `FormatLinearMethod`."""
        super().process_weights_after_loading(layer)
        layer.register_buffer("input_order", self.format.order, persistent=False)

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` [..., k] to [..., n] in x's dtype."""
        ordered = x if layer.input_order is None else x.index_select(-1, layer.input_order)
        return super().apply(layer, ordered, bias)
