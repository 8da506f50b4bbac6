"""LoRA adapters of a model: opened, and what they need of vLLM's engine and server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from quantserve.checkpoint.adapter import Adapter, open_adapter
from quantserve.checkpoint.downloads import folder_of
from quantserve.checks.adapters import largest_rank
from quantserve.config import ModelConfig
from quantserve.config.engine_args import LORA_RANKS

MOST_SLOTS: Final = 8
"""Adapters in one batch unless the config says otherwise; each has a slot in memory."""


def open_adapters(model: ModelConfig) -> tuple[Adapter, ...]:
    """The adapters of a model, without their weights.

    Raises:
        CheckpointError: one is not there, or it cannot be reached; names it.
    """
    pickles = model.allow_pickle
    return tuple(open_adapter(one.name, one.source, one.revision, allow_pickle=pickles) for one in model.adapters)


def lora_arguments(adapters: Sequence[Adapter], given: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's engine arguments for adapters: all of them stay loaded, and up to eight compute in one batch.

    Args:
        adapters: those of the model.
        given: the engine arguments of the config, which win.
    """
    if not adapters:
        return {}
    slots = given.get("max_loras") or min(len(adapters), MOST_SLOTS)
    rank = max(map(largest_rank, adapters))
    return {
        "enable_lora": True,
        "max_loras": slots,
        "max_cpu_loras": max(slots, len(adapters)),
        "max_lora_rank": next((one for one in LORA_RANKS if one >= rank), LORA_RANKS[-1]),
    }


def lora_modules(adapters: Sequence[Adapter], model_id: str) -> dict[str, Any]:
    """The argument of vLLM's server that names the adapters; empty without adapters."""
    modules = [{"name": one.name, "path": str(folder_of(one)), "base_model_name": model_id} for one in adapters]
    return {"lora_modules": modules} if modules else {}
