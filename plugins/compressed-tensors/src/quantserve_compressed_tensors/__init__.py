"""compressed-tensors for quantserve and, on CPUs, for vLLM. Importing this package imports neither vLLM nor torch."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["register"]


def register() -> None:
    """Add quantserve's kernel to vLLM's own for CPUs, in engines that ask for this plugin; safe to call again."""
    if find_spec("quantserve_kernels") is not None:
        from quantserve_kernels.vllm import register_linear_kernel

        register_linear_kernel("quantserve-compressed-tensors:compressed-tensors")
