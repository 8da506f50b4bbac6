"""HQQ for quantserve and for vLLM. Importing this package imports neither vLLM nor torch."""

__all__ = ["register"]


def register() -> None:
    """Make ``quantization="hqq"`` known to the vLLM of this process; safe to call any number of times."""
    from quantserve_hqq._vllm import Hqq
    from quantserve_kernels import vllm

    vllm.register(Hqq)
