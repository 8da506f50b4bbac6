"""4-bit weights in groups of 64. Importing this package imports neither torch nor vLLM."""


def register() -> None:
    """Make ``quantization="old4"`` known to the vLLM of this process; safe to call any number of times."""
    from quantserve_old4 import engine

    engine.register()
