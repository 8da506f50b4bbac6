"""The kernels as vLLM's own linear kernels: vLLM's AWQ, GPTQ, AutoRound and compressed-tensors methods call them.

vLLM reads the checkpoint with its own method and asks a list of kernels, in order, which of them implements a layer.
`register` adds `CodebookLinearKernel`, which vLLM asks after its own kernels for CPUs: it computes the layers that they
do not, and all layers where ``VLLM_DISABLED_KERNELS=CPUWNA16LinearKernel,ZentorchWNA16LinearKernel`` leaves them out.
Written against vLLM 0.32; the arguments of act-order, which 0.29 has besides, are accepted.
"""

from __future__ import annotations

from functools import cache
from weakref import WeakSet, ref

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.modules.module import register_module_parameter_registration_hook
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import register_linear_kernel
from vllm.model_executor.kernels.linear.mixed_precision import MPLinearKernel, MPLinearLayerConfig
from vllm.platforms import PlatformEnum, current_platform
from vllm.scalar_type import scalar_types

from quantserve_kernels import PackedWeight, load, pack, status, unpack_stream
from quantserve_kernels.vllm.linear import blaming, install

# The integer types whose codes fill int32 words without a rest. For 3 bits, writers disagree on how they do.
# vLLM before 0.31 has no uint2.
TYPES = tuple(
    getattr(scalar_types, name)
    for name in ("uint2", "uint2b2", "uint4", "uint4b8", "uint8", "uint8b128")
    if hasattr(scalar_types, name)
)
ACTIVATIONS = (torch.float16, torch.bfloat16, torch.float32)

logger = init_logger(f"vllm.{__name__}")
_new: WeakSet[MPLinearKernel] = WeakSet()
"""Kernels of the model that is being built; counted in the log, and cleared, when its weights are packed."""


class CodebookLinearKernel(MPLinearKernel):
    """`quantserve_kernels` behind vLLM's interface for linears with integer weights and floating-point activations."""

    @classmethod
    def get_min_capability(cls) -> int:
        """CUDA compute capability times ten; CPUs have none."""
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether a layer can be computed, and if not, why."""
        reason = _refused(c)
        return not reason, reason or None

    def __init__(
        self,
        c: MPLinearLayerConfig,
        w_q_param_name: str,
        w_s_param_name: str,
        w_zp_param_name: str | None = None,
        w_gidx_param_name: str | None = None,  # vLLM 0.29; `can_implement` refuses act-order
    ) -> None:
        super().__init__(c, w_q_param_name, w_s_param_name, w_zp_param_name)
        _new.add(self)
        scales = getattr(_newest(), w_s_param_name, None)
        if isinstance(scales, Parameter):
            # NaN shows what no tensor arrived for. In float32 no scale of the file is rounded, whatever the model's
            # dtype.
            scales.data = torch.full(scales.shape, torch.nan, dtype=torch.float32)

    def process_weights_after_loading(self, layer: Module) -> None:
        """Pack the loaded tensors, which the kernel's take the place of.

        The packed codes keep the name of the weight, where vLLM's LoRA wrapper looks for the layer's device.

        Raises:
            ValueError: scales never arrived, or scales or the bias are not finite; names the layer.
        """
        _say_once()
        with blaming(layer, "download or export the checkpoint again"):
            weight = self._pack(layer)
        for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
            if name and hasattr(layer, name):
                delattr(layer, name)
        install(weight, layer, self.w_q_name)

    def apply_weights(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` [..., k] to [..., n] in x's dtype."""
        out: Tensor = layer.kernel(x, bias)
        return out

    def _pack(self, layer: Module) -> PackedWeight:
        words, scales = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
        zeros = getattr(layer, self.w_zp_name or "", None)
        kind = self.config.weight_type
        k, n = self.config.partition_weight_shape
        if words.packed_dim != words.input_dim:
            raise ValueError(f"{self.w_q_name} is packed along N; the kernel takes weights packed along K")
        stream = words.data if words.input_dim == 0 else words.data.t()  # [k * bits / 32, n]
        scale = scales.data if scales.output_dim == 0 else scales.data.t()  # [n, k / group]
        if lost := int(scale.isnan().sum()):
            raise ValueError(f"{lost} of {scale.numel()} values of {self.w_s_name} never arrived, or are NaN")
        zero = None
        # Types with a bias have no zeros. AWQ files have them even if their config says `zero_point: false`.
        if not kind.has_bias() and zeros is not None:
            packed = zeros.data if zeros.packed_dim == 0 else zeros.data.t()  # [n * bits / 32, k / group]
            zero = unpack_stream(packed.contiguous(), kind.size_bits)[:, :n].t().to(scale.dtype)
        return pack(
            lambda first, last: unpack_stream(stream[:, first:last], kind.size_bits),
            torch.arange(2**kind.size_bits, dtype=torch.float32)[None] - kind.bias,
            bits=kind.size_bits,
            shape=(n, k),
            scales=scale,
            zeros=zero,
            group_size=k // scale.shape[1],
        )


def serves(layer: Module) -> bool:
    """Whether a linear layer is computed by this kernel."""
    found = getattr(layer, "quant_method", None)
    for name in ("scheme", "linear_method"):  # of AutoRound's methods
        found = getattr(found, name, found)
    found = getattr(layer, "scheme", found)  # compressed-tensors'
    return isinstance(getattr(found, "kernel", None), CodebookLinearKernel)


@cache
def register() -> None:
    """Add the kernel to vLLM's for CPUs in this process, for experts too; elsewhere do nothing. Safe to call again."""
    from quantserve_kernels.vllm import expert_kernels  # which imports this module

    if current_platform.is_cpu():  # on GPUs vLLM's own kernels are the fast ones
        load()
        expert_kernels.register()
        register_linear_kernel(CodebookLinearKernel, PlatformEnum.CPU, "mp")


@cache
def keep_scales() -> None:
    """Load the scales of later layers as the file has them, and tell those that never arrive. Safe to call again.

    vLLM makes a layer's kernel right after the layer's parameters and does not say for which layer, so torch is asked
    to report every parameter. Without this, vLLM rounds scales to the model's dtype.
    """
    register_module_parameter_registration_hook(_remember)


def _refused(c: MPLinearLayerConfig) -> str:
    """Why a layer cannot be computed; "" where it can."""
    if not current_platform.is_cpu():
        return "it runs on CPUs only"
    if not (found := status()).native:
        return f"quantserve-kernels is not compiled here ({found.reason})"
    if c.weight_type not in TYPES:
        return f"weights are {c.weight_type}; it takes {', '.join(map(str, TYPES))}"
    if c.act_type not in ACTIVATIONS:
        return f"activations are {c.act_type}; it takes {', '.join(map(str, ACTIVATIONS))}"
    if c.out_type not in (None, c.act_type):
        return f"activations are {c.act_type} and results {c.out_type}; it gives results in the dtype of activations"
    if getattr(c, "has_g_idx", False):  # vLLM 0.29; later versions refuse it themselves
        return "the checkpoint has act-order (desc_act)"
    k = c.partition_weight_shape[0]
    if k * c.weight_type.size_bits % 32:
        return f"K {k} is no whole number of int32 words of {c.weight_type.size_bits}-bit codes"
    if c.group_size != -1 and (c.group_size < 1 or k % c.group_size):
        return f"groups of {c.group_size} do not divide K {k}"
    return ""


_last: ref[Module] | None = None


def _remember(module: Module, name: str, parameter: Parameter | None) -> None:
    """Remember the last layer that registered a parameter: vLLM makes the kernel after these, without the layer."""
    global _last
    _last = ref(module)


def _newest() -> Module | None:
    return _last() if _last else None


def _say_once() -> None:
    if _new:
        layers = f"{len(_new)} on {CodebookLinearKernel.__name__}"
        logger.info_once("Quantized linear layers: %s (instruction set %s)", layers, status().instruction_set)
        _new.clear()
