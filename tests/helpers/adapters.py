"""LoRA adapters in PEFT's layout with random weights, and checkpoints they are merged into."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .plain import write_plain

SUFFIX = {"A": ".lora_A.weight", "B": ".lora_B.weight"}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def write_adapter(
    folder: Path,
    plain: Path,
    *,
    rank: int = 8,
    alpha: float = 16,
    targets: tuple[str, ...] = (*ATTENTION, *MLP),
    size: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Write an adapter for every linear of an unquantized checkpoint that is named like one of `targets`.

    Args:
        folder: a new folder.
        plain: a checkpoint with its weights in model.safetensors.
        rank: of every module.
        alpha: ``lora_alpha``.
        targets: last parts of module names.
        size: norm of what the adapter adds to a weight, in norms of the weight.
        seed: of the random values.
        dtype: of the tensors.
        config: further keys of adapter_config.json.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in targets:
            continue
        (n, k), scale = weight.shape, _scale(rank, alpha, config)
        a = torch.randn(rank, k, generator=generator) / math.sqrt(k)
        b = torch.randn(n, rank, generator=generator)
        b *= size * weight.float().norm() / (scale * (b @ a).norm())
        made |= {f"base_model.model.{module}{SUFFIX[half]}": value.to(dtype) for half, value in (("A", a), ("B", b))}
    save_file(made, folder / "adapter_model.safetensors", {"format": "pt"})
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(plain),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(written, indent=2))
    return folder


def merge(plain: Path, adapter: Path, destination: Path) -> Path:
    """W + scale B A for every pair, in float32: the model that PEFT computes.

    Args:
        plain: an unquantized checkpoint.
        adapter: as `write_adapter` writes it.
        destination: a new folder.

    Returns:
        The destination.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = {name: tensor.float() for name, tensor in load_file(plain / "model.safetensors").items()}
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, a in tensors.items():
        if name.endswith(SUFFIX["A"]):
            module = name.removeprefix("base_model.model.").removesuffix(SUFFIX["A"])
            b = tensors[name.replace(SUFFIX["A"], SUFFIX["B"])]
            scale = _scale(a.shape[0], config["lora_alpha"], config)
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + scale * b.float() @ a.float()
    return write_plain(plain, destination, weights)


def _scale(rank: int, alpha: float, config: Mapping[str, Any]) -> float:
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
