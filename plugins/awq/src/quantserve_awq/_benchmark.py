"""An AWQ linear on quantserve's kernel and on vLLM's own for CPUs, for `quantserve calibrate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantserve_kernels import from_awq, linear

GROUP = 128
_STRIP = 512  # output channels with values of their own; the time does not depend on values


def make(n: int, k: int, bits: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """A linear [n, k] with random codes in groups of 128 on quantserve's kernel, and the bytes one call reads."""
    weight = from_awq(*_tensors(n, k))
    return lambda x: linear(x, weight), weight.nbytes


def make_vllm(n: int, k: int, bits: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """The same on vLLM's own kernel for bfloat16, prepared by vLLM's own classes.

    Raises:
        ImportError: vLLM is not installed, or not for CPUs.
    """
    from vllm.model_executor import parameter
    from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig, AutoAWQMarlinLinearMethod
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise ImportError("this vLLM is not built for CPUs")
    current_platform.import_kernels()
    method = AutoAWQMarlinLinearMethod(AutoAWQConfig(4, GROUP, True, False, None, {}))
    layer: Any = torch.nn.Module()
    layer.bias = None
    with _one_rank(parameter):
        method.create_weights(layer, k, [n], k, n, torch.bfloat16, weight_loader=None)
    for name, tensor in zip(("qweight", "qzeros", "scales"), _tensors(n, k), strict=True):
        getattr(layer, name).data.copy_(tensor)
    with _one_rank(parameter):
        method.process_weights_after_loading(layer)
    return lambda x: method.apply(layer, x), sum(tensor.nbytes for tensor in layer.parameters())


def _tensors(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """qweight [k, n / 8], qzeros [k / 128, n / 8] int32 and scales [k / 128, n] float16."""

    def words(rows: int) -> Tensor:
        strip = torch.randint(-(2**31), 2**31, (rows, min(n, _STRIP) // 8), dtype=torch.int32)
        return strip.repeat(1, -(-n // _STRIP))[:, : n // 8].contiguous()

    return words(k), words(k // GROUP), (0.004 * (0.5 + torch.rand(k // GROUP, n))).half()


@contextmanager
def _one_rank(parameter: Any) -> Iterator[None]:
    """vLLM's parameters ask the process groups of a started engine for their rank; here there is one."""
    names = ("get_tensor_model_parallel_rank", "get_tensor_model_parallel_world_size")
    kept = [getattr(parameter, name) for name in names]
    for name, value in zip(names, (0, 1), strict=True):
        setattr(parameter, name, partial(int, value))
    try:
        yield
    finally:
        for name, function in zip(names, kept, strict=True):
            setattr(parameter, name, function)
