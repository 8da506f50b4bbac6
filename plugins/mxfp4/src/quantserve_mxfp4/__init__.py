"""MXFP4 for quantserve and, on CPUs, for vLLM. Importing this package imports neither vLLM nor torch."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["register"]


def register() -> None:
    """Serve MXFP4 on quantserve's kernels in engines on CPUs that ask for this plugin; safe to call again."""
    if find_spec("quantserve_kernels") is not None:
        from quantserve_kernels import vllm

        if vllm.serves_cpus("quantserve-mxfp4:mxfp4"):
            from quantserve_mxfp4._vllm import Mxfp4

            vllm.register(Mxfp4)
