"""bitsandbytes for quantserve and for vLLM. Importing this package imports neither vLLM nor torch."""

from importlib.metadata import entry_points
from importlib.util import find_spec

__all__ = ["THEIRS", "register"]

THEIRS = "vllm_bnb_plugin"
"""The package of vLLM's own plugin for bitsandbytes, for GPUs."""


def register() -> None:
    """Make ``quantization="bitsandbytes"`` known to the vLLM of this process; safe to call any number of times.

    On GPUs that is vLLM's own plugin where it is installed, on CPUs and elsewhere quantserve's kernels.
    """
    from vllm.platforms import current_platform

    if find_spec(THEIRS) is not None and not current_platform.is_cpu():
        for entry in entry_points(group="vllm.general_plugins"):
            if entry.module.partition(".")[0] == THEIRS:
                entry.load()()
        return
    from quantserve_bitsandbytes._vllm import Bitsandbytes
    from quantserve_kernels import vllm

    vllm.register(Bitsandbytes)
