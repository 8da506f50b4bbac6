"""Everything that can be found wrong with a model before a GPU is touched, whatever its method."""

from quantserve.checks.fused import check_fused_groups
from quantserve.checks.linear import Expected, check_linears, check_shards, quantized_linears
from quantserve.checks.model import check_model
from quantserve.checks.skipped import SkipList

__all__ = [
    "Expected",
    "SkipList",
    "check_fused_groups",
    "check_linears",
    "check_model",
    "check_shards",
    "quantized_linears",
]
