"""compressed-tensors for quantserve and, on CPUs, for vLLM. Importing this package imports neither vLLM nor torch."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["register"]


def register() -> None:
    """Make `quantization="compressed_tensors_codebook"` known, and quantserve's kernel to vLLM's own method on CPUs.

    Both are for engines that ask for this plugin; safe to call again.
    """
    if find_spec("quantserve_kernels") is not None:
        from quantserve_compressed_tensors._vllm import CompressedTensors
        from quantserve_kernels import vllm

        vllm.register(CompressedTensors)
        vllm.register_linear_kernel("quantserve-compressed-tensors:compressed-tensors")
