"""Keeps LoRA adapters off the tokens of other requests on CPUs; one of `patches.PATCHES`.

vLLM marks a token without an adapter with the index -1, and its operations for CPUs take that for the last slot.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch import Tensor

OPERATIONS: Final = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")


def without_strangers(operation: Callable[..., Any]) -> Callable[..., Any]:
    """An operation of `OPERATIONS` that adds nothing to rows whose index is negative.

    Args:
        operation: takes inputs [rows, k], the weights of all slots, the output [rows, n] and the slot of each row.
    """

    @wraps(operation)
    def masked(inputs: Tensor, weights: Tensor, output: Tensor, slots: Tensor, *rest: Any, **options: Any) -> Any:
        return operation(inputs.masked_fill((slots < 0).unsqueeze(-1), 0), weights, output, slots, *rest, **options)

    return masked


def leave_out_other_rows() -> None:
    """Let the operations of both modules that call them be `without_strangers`."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name in OPERATIONS:
        operation = without_strangers(getattr(lora_ops, name))
        for module in (lora_ops, punica_cpu):
            setattr(module, name, operation)
