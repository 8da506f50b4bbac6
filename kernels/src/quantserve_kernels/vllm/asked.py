"""Engines that ask for quantserve's linear kernel; a plain `vllm serve`, which loads every plugin, keeps its own."""

from __future__ import annotations

import os
from collections.abc import Mapping


def register_linear_kernel(side: str) -> None:
    """Add quantserve's kernel to vLLM's for CPUs where this process asks for the plugin `side`; safe to call again.

    Args:
        side: ``distribution:entry point`` of the plugin.
    """
    if asked_for(side, os.environ):
        from quantserve_kernels.vllm import linear_kernels

        linear_kernels.register()


def asked_for(side: str, environ: Mapping[str, str]) -> bool:
    """Whether a plan of quantserve names the plugin, or a person names its entry point in ``VLLM_PLUGINS``."""
    sides = environ.get("QUANTSERVE_ENGINE_PLUGINS", "").split(",")
    return side in sides or side.partition(":")[2] in environ.get("VLLM_PLUGINS", "").split(",")


def serves_cpus(side: str) -> bool:
    """Whether this process is an engine on a CPU that asks for the plugin `side` (``distribution:entry point``).

    There a plugin may register a `Format` under the name of a method that vLLM serves itself on GPUs.
    """
    from vllm.platforms import current_platform

    return asked_for(side, os.environ) and current_platform.is_cpu()
