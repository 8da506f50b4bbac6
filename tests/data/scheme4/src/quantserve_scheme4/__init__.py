"""4-bit weights in groups of 64. Importing this package imports neither torch nor vLLM."""


def register() -> None:
    """Make the method known to the vLLM of this process; safe to call any number of times."""
    from quantserve_kernels import vllm
    from quantserve_scheme4.engine import Scheme4

    vllm.register(Scheme4)
