"""GPTQ for quantserve and, where vLLM's own GPTQ does not reach, for vLLM.

Two doors, one per entry-point group. `quantserve.plugins` names the light module `plugin`; `vllm.general_plugins` names
`register` below, which vLLM calls in every process of an engine. Importing this package imports neither vLLM nor torch.
"""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["register"]


def register() -> None:
    """Make `quantization="gptq_codebook"` known to the vLLM of this process; safe to call again.

    A plain `vllm serve` keeps its own GPTQ: files that declare ``gptq`` get this one only where it is asked for.
    """
    if find_spec("quantserve_kernels") is not None:
        from quantserve_gptq._vllm import Gptq
        from quantserve_kernels import vllm

        vllm.register(Gptq)
