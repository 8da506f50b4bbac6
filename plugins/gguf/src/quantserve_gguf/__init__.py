"""GGUF for quantserve and for vLLM.

Two doors, one per entry-point group. `quantserve.plugins` names the light module `plugin`; `vllm.general_plugins`
names `register` below, which vLLM calls in every process of an engine. Importing this package imports neither vLLM
nor torch.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Make .gguf files known to the vLLM of this process, as models and weights. Safe to call any number of times."""
    from quantserve_gguf._vllm import install

    install()
