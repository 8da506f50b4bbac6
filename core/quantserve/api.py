"""The one door for plugin authors.

Everything a plugin's light module needs is here, and nothing else in ``quantserve`` is promised to
stay. Importing this module imports no torch, vLLM or Ray. `ModelConfig` brings pydantic, so a light
module imports it for its annotations only, under ``TYPE_CHECKING``, and `quantserve list` stays fast.
"""

from typing import TYPE_CHECKING

from quantserve.checkpoint import Checkpoint, Tensor
from quantserve.checks.linear import Expected, check_fused_groups, check_linears, check_shards, quantized_linears
from quantserve.finding import Finding, Severity
from quantserve.hookspecs import hookimpl
from quantserve.layers import Linear, linears, modules, other_tensors, shard_k, shard_n
from quantserve.method import KernelProfile, Method, PerformanceProfile, QualityNote
from quantserve.published import PublishedRun, published_profile
from quantserve.target import Target

if TYPE_CHECKING:
    from quantserve.config import ModelConfig

__all__ = [
    "Checkpoint",
    "Expected",
    "Finding",
    "KernelProfile",
    "Linear",
    "Method",
    "ModelConfig",
    "PerformanceProfile",
    "PublishedRun",
    "QualityNote",
    "Severity",
    "Target",
    "Tensor",
    "check_fused_groups",
    "check_linears",
    "check_shards",
    "hookimpl",
    "linears",
    "modules",
    "other_tensors",
    "published_profile",
    "quantized_linears",
    "shard_k",
    "shard_n",
]


def __getattr__(name: str) -> object:
    if name == "ModelConfig":
        from quantserve.config import ModelConfig

        return ModelConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
