"""The light module of the awq plugin."""

from quantserve.api import Method, hookimpl


@hookimpl
def quantserve_method() -> Method:
    """Describe the method."""
    return Method("awq", "awq", (4,), "awq")
