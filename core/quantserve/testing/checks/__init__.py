"""The checks of the kit, by group. Importing this registers them, in the order of their ids."""

from quantserve.testing.checks import (  # noqa: I001 - the order of ids
    seam,
    detection,
    validation,
    parallel,
    numerics,
    isolation,
    predictions,
    text,
    tools,
    engine,
)

__all__ = [
    "detection", "engine", "isolation", "numerics", "parallel", "predictions", "seam", "text", "tools", "validation",
]  # fmt: skip
