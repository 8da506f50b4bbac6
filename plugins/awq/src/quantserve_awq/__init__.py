"""AWQ for quantserve and, on CPUs, for vLLM.

Two doors, one per entry-point group. `quantserve.plugins` names the light module `plugin`; `vllm.general_plugins` names
`register` below, which vLLM calls in every process of an engine. Importing this package imports neither vLLM nor torch.
"""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["register"]


def register() -> None:
    """Add quantserve's kernel to vLLM's own for CPUs, in engines that ask for this plugin; safe to call again."""
    if find_spec("quantserve_kernels") is not None:
        from quantserve_kernels.vllm import register_linear_kernel

        register_linear_kernel("quantserve-awq:awq")
