"""The format a checkpoint is in, by name, where no installed plugin serves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantserve.families import VLLM, quantization_methods

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint

_NAMES: Mapping[str, str] = {
    "gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "compressed-tensors": "compressed-tensors",
    "modelopt": "ModelOpt FP8", "modelopt_fp4": "ModelOpt NVFP4", "mxfp4": "MXFP4", "bitsandbytes": "bitsandbytes",
    "hqq": "HQQ", "quark": "Quark", "auto-round": "AutoRound", "intel/auto-round": "AutoRound", "exl2": "EXL2",
    "exl3": "EXL3", "torchao": "torchao", "bitnet": "BitNet", "aqlm": "AQLM", "vptq": "VPTQ", "spqr": "SpQR",
    "mlx": "MLX", "gguf": "GGUF", "squeezellm": "SqueezeLLM", "eetq": "EETQ", "fbgemm_fp8": "FBGEMM FP8",
    "quanto": "Quanto", "higgs": "HIGGS",
}  # fmt: skip
_SPELLINGS: Mapping[str, str] = {"compressed_tensors": "compressed-tensors"}
_SUFFIXES: Mapping[str, str] = {
    "weight_packed": "compressed-tensors", "weight_scale_inv": "fp8", "q_invperm": "exl2", "trellis": "exl3",
    "W_q": "hqq", "lookup_table": "squeezellm", "g_idx": "gptq",
}  # fmt: skip


def format_of(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """The quantization format of a checkpoint and where that is written; None when nothing tells.

    Returns:
        A name such as ``gptq`` in lower case, and ``quantization_config``, a file name or the name of a tensor.
    """
    declared = checkpoint.quantization_config or {}
    method = declared.get("quant_method")
    if isinstance(method, str) and method.strip():
        name = _SPELLINGS.get(method.strip().lower(), method.strip().lower())
        if name == "modelopt" and "FP4" in str(declared.get("quant_algo")):
            name = "modelopt_fp4"
        return name, "quantization_config"
    if "hf_quant_config.json" in checkpoint.quant_files:
        quantization = checkpoint.quant_files["hf_quant_config.json"].get("quantization")
        algorithm = quantization.get("quant_algo") if isinstance(quantization, Mapping) else None
        return ("modelopt_fp4" if "FP4" in str(algorithm) else "modelopt"), "hf_quant_config.json"
    mlx = checkpoint.config.get("quantization")
    if isinstance(mlx, Mapping) and "group_size" in mlx:
        return "mlx", "quantization in config.json"
    for name, values in checkpoint.quant_files.items():
        if name.endswith("quantize_config.json") and "bits" in values:
            return str(values.get("quant_method") or "gptq").lower(), name
    for name in checkpoint.tensors:
        tail = name.rpartition(".")[2]
        if ".quant_state.bitsandbytes" in name:
            return "bitsandbytes", name
        if tail in _SUFFIXES:
            return _SUFFIXES[tail], name
    return None


def format_title(name: str) -> str:
    """How a format is written in prose: ``GPTQ``."""
    return _NAMES.get(name, name[:40])


def served_by_vllm(name: str) -> str:
    """A sentence about who serves a format that no plugin does."""
    if name in quantization_methods() or name in ("modelopt", "auto-round"):
        return f"vLLM {VLLM} serves it by itself (`vllm serve MODEL`); quantserve needs a plugin for it"
    if name in _NAMES:
        return f"vLLM {VLLM} does not serve it either"
    return ""
