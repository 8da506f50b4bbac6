"""8-bit rounding to nearest for quantserve and vLLM. Importing this package imports neither torch nor vLLM."""


def register() -> None:
    """Make ``quantization="rtn8"`` known to the vLLM of this process; safe to call any number of times."""
    from quantserve_kernels import vllm
    from quantserve_rtn8.engine import Rtn8

    vllm.register(Rtn8)
