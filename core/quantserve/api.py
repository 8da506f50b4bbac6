"""The one door for plugin authors.

Everything a plugin's light module needs is here, and nothing else in ``quantserve`` is promised to
stay. Importing this module imports no torch, vLLM or Ray.
"""

from quantserve.checkpoint import Checkpoint, Tensor
from quantserve.config import ModelConfig
from quantserve.finding import Finding, Severity
from quantserve.hookspecs import hookimpl
from quantserve.layers import Linear, linears, other_tensors
from quantserve.method import Method, PerformanceProfile
from quantserve.target import Target

__all__ = [
    "Checkpoint",
    "Finding",
    "Linear",
    "Method",
    "ModelConfig",
    "PerformanceProfile",
    "Severity",
    "Target",
    "Tensor",
    "hookimpl",
    "linears",
    "other_tensors",
]
