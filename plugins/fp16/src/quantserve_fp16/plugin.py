"""The light module of the fp16 plugin."""

from quantserve.api import Method, hookimpl


@hookimpl
def quantserve_method() -> Method:
    """Describe the method."""
    return Method("fp16", "fp16", (16,), None)
