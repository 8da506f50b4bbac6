"""A 16-bit linear for `quantserve calibrate`: vLLM's own operator where vLLM runs on this CPU, else torch's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor


def make(n: int, k: int, bits: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """A linear [n, k] with random bfloat16 weights, and the bytes one call reads."""
    weight = torch.randn(64, k).mul_(0.02).bfloat16().repeat(-(-n // 64), 1)[:n].contiguous()
    nbytes = weight.nbytes
    if importlib.util.find_spec("vllm") is not None:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            current_platform.import_kernels()
            layer = torch.nn.Module()
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
            dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
            return lambda x: layer.cpu_linear(x, layer.weight, None), nbytes
    return lambda x: torch.nn.functional.linear(x, weight), nbytes
