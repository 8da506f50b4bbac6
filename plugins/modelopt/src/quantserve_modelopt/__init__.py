"""ModelOpt for quantserve and, on CPUs, for vLLM. Importing this package imports neither vLLM nor torch."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["register"]


def register() -> None:
    """Serve ModelOpt on quantserve's kernels in engines on CPUs that ask for this plugin; safe to call again."""
    if find_spec("quantserve_kernels") is not None:
        from quantserve_kernels import vllm

        if vllm.serves_cpus("quantserve-modelopt:modelopt"):
            from quantserve_modelopt._vllm import ModelOpt

            vllm.register(ModelOpt)
