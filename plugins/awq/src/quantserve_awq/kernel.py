"""Which kernel an AWQ model gets on a CPU: quantserve's, or vLLM's own, which is slower than bfloat16."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from quantserve.api import Finding, Target

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

METHOD = "awq"  # vLLM's own
KERNEL_METHOD = "quantserve_awq"  # what `_vllm` registers
VLLM_ALIAS = "awq_vllm"  # what a config says to get vLLM's own on a CPU


def missing() -> str | None:
    """Why quantserve's kernels cannot be used here, None when they can."""
    if find_spec("quantserve_kernels") is None:
        return "quantserve-kernels is not installed"
    from quantserve_kernels import status

    found = status()
    return None if found.native else f"quantserve-kernels is not compiled here ({found.reason})"


def uses_own_kernel(model: ModelConfig, target: Target) -> bool:
    """Whether the model's linears run on quantserve's kernels."""
    return target.device == "cpu" and model.quantization != VLLM_ALIAS and missing() is None


def kernel_finding(model: ModelConfig, target: Target) -> list[Finding]:
    """Says so when a CPU gets vLLM's kernel without having been asked to."""
    if target.device != "cpu" or model.quantization == VLLM_ALIAS or uses_own_kernel(model, target):
        return []
    return [
        Finding.warning(
            "awq-slow-kernel",
            f"{missing()}, so vLLM's own AWQ kernel for CPUs is used, which is slower than an unquantized model",
            ["engine_kwargs.quantization"],
            "install a C++ compiler and then 'quantserve-awq[engine]'; or set engine_kwargs.quantization to "
            f"{VLLM_ALIAS} if vLLM's is meant",
        )
    ]
