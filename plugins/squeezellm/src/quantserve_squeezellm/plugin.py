"""The light module of the squeezellm plugin."""

from quantserve.api import Method, hookimpl


@hookimpl
def quantserve_method() -> Method:
    """Describe the method."""
    return Method("squeezellm", "squeezellm", (3, 4), "squeezellm")
