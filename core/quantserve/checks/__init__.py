"""Everything that can be found wrong with a model before a GPU is touched, whatever its method."""

from quantserve.checks.linear import (
    Expected,
    check_fused_groups,
    check_linears,
    check_shards,
    quantized_linears,
)
from quantserve.checks.model import check_model

__all__ = [
    "Expected",
    "check_fused_groups",
    "check_linears",
    "check_model",
    "check_shards",
    "quantized_linears",
]
