"""AWQ for quantserve and, on CPUs, for vLLM.

Two doors, one per entry-point group. `quantserve.plugins` names the light module `plugin`; `vllm.general_plugins` names
`register` below, which vLLM calls in every process of an engine. Importing this package imports neither vLLM nor torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

__all__ = ["register"]


def register() -> None:
    """Add quantserve's kernel to vLLM's own for CPUs, in engines that ask for this plugin; safe to call again.

    A plain `vllm serve`, which loads every installed plugin, keeps its kernels.
    """
    from importlib.util import find_spec

    if not asked_for(os.environ) or find_spec("quantserve_kernels") is None:
        return
    from quantserve_kernels.vllm import linear_kernels

    linear_kernels.register()


def asked_for(environ: Mapping[str, str]) -> bool:
    """Whether a plan of quantserve names this plugin, or a person does in ``VLLM_PLUGINS``."""
    sides = environ.get("QUANTSERVE_ENGINE_PLUGINS", "").split(",")
    return "quantserve-awq:awq" in sides or "awq" in environ.get("VLLM_PLUGINS", "").split(",")
