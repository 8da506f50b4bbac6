"""vLLM's operators for linears on CPUs, on weights that vLLM's own classes prepare."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.contenders import Call, Contender, Rotation, copies, normal_weight
from benchmarks.kernels.formats import GROUP, awq_tensors
from benchmarks.kernels.results import VLLM_AWQ, VLLM_BF16
from benchmarks.kernels.shapes import Shape

SLICE = 4096  # output channels converted at once: vLLM unpacks them to 32 bits a weight


class Missing(Exception):
    """vLLM, or one of its operators, is not here; str(error) says which."""


class Vllm:
    """What the contenders need of vLLM.

    Raises:
        Missing: no vLLM, or not for CPUs.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise Missing("vLLM is not installed")
        from vllm.model_executor import parameter
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            raise Missing("this vLLM is not built for CPUs")
        current_platform.import_kernels()
        # One rank, which vLLM otherwise learns from the process groups of a started engine.
        parameter.get_tensor_model_parallel_rank = lambda: 0
        parameter.get_tensor_model_parallel_world_size = lambda: 1

    def bf16(self, shape: Shape, working_set: int) -> Contender:
        """vLLM's unquantized linear: `dispatch_cpu_unquantized_gemm` prepacks the weight for oneDNN."""
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        weight = normal_weight(shape)

        def call() -> Call:
            layer: Any = torch.nn.Module()
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
            return lambda x: layer.cpu_linear(x, layer.weight, None)

        count = copies(weight.nbytes, working_set)
        return Contender(VLLM_BF16, Rotation([call() for _ in range(count)]), weight.nbytes)

    def awq(self, shape: Shape, working_set: int) -> Contender:
        """vLLM's AWQ linear (`CPUWNA16LinearKernel`) on the weight of `formats.awq`."""
        method, first = self._awq_layer(shape)
        nbytes = sum(tensor.nbytes for tensor in first.parameters())

        def call(layer: Any) -> Call:
            return lambda x: method.apply(layer, x)

        layers = [first, *(clone(first) for _ in range(copies(nbytes, working_set) - 1))]
        return Contender(VLLM_AWQ, Rotation([call(layer) for layer in layers]), nbytes)

    def _awq_layer(self, shape: Shape) -> tuple[Any, Any]:
        """Method and layer of the whole shape, converted some output channels at a time."""
        from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig, AutoAWQMarlinLinearMethod

        config = AutoAWQConfig(
            weight_bits=4,
            group_size=GROUP,
            zero_point=True,
            lm_head_quantized=False,
            modules_to_not_convert=None,
            full_config={},
        )
        method = AutoAWQMarlinLinearMethod(config)
        qweight, qzeros, scales = awq_tensors(shape.n, shape.k)
        layers: list[Any] = []
        for begin in range(0, shape.n, SLICE):
            end = min(begin + SLICE, shape.n)
            layer: Any = torch.nn.Module()
            method.create_weights(
                layer, shape.k, [end - begin], shape.k, end - begin, torch.bfloat16, weight_loader=None
            )
            layer.qweight.data.copy_(qweight[:, begin // 8 : end // 8])
            layer.qzeros.data.copy_(qzeros[:, begin // 8 : end // 8])
            layer.scales.data.copy_(scales[:, begin:end])
            method.process_weights_after_loading(layer)
            layers.append(layer)
        whole = layers[0]
        # Blocks of 16 channels lie one after the other; scales and zeros have a row per group.
        for name, dim in {"qweight": 0, "qzeros": 1, "scales": 1}.items():
            parts = [getattr(layer, name).data for layer in layers]
            replace(whole, name, torch.cat(parts, dim) if len(parts) > 1 else parts[0])
        return method, whole


def clone(layer: Any) -> Any:
    """A copy of a prepared layer."""
    copy: Any = torch.nn.Module()
    copy.__dict__.update({key: value for key, value in layer.__dict__.items() if not key.startswith("_")})
    for name, tensor in layer.named_parameters():
        replace(copy, name, tensor.data.clone())
    return copy


def replace(layer: Any, name: str, tensor: Tensor) -> None:
    """Set a parameter to another tensor of any shape."""
    setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
