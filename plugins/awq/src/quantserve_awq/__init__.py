"""AWQ for quantserve and, on CPUs, for vLLM.

Two doors, one per entry-point group. `quantserve.plugins` names the light module `plugin`; `vllm.general_plugins` names
`register` below, which vLLM calls in every process of an engine. Importing this package imports neither vLLM nor torch.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Make `quantization="quantserve_awq"` known to the vLLM of this process, on CPUs; safe to call again."""
    from importlib.util import find_spec

    if find_spec("quantserve_kernels") is None:
        return  # the plan then asks for vLLM's own method
    from quantserve_awq import _vllm

    _vllm.register()
