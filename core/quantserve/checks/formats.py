"""The format a checkpoint is in, by name, and what serves it where no installed plugin does."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantserve.families import VLLM, quantization_methods

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Format:
    """A format of quantized checkpoints.

    Attributes:
        title: how it is written in prose.
        tool: what writes it.
        plugin: this project's plugin for it, "" for none.
        elsewhere: what serves it, where neither this project nor vLLM does.
    """

    title: str
    tool: str
    plugin: str = ""
    elsewhere: str = ""


_TRANSFORMERS = "transformers with the package {}"
FORMATS: Mapping[str, Format] = {
    "gptq": Format("GPTQ", "GPTQModel or AutoGPTQ", "gptq"),
    "awq": Format("AWQ", "AutoAWQ", "awq"),
    "squeezellm": Format("SqueezeLLM", "SqueezeLLM", "squeezellm"),
    "fp8": Format("FP8", "the model's vendor or transformers", "fp8"),
    "compressed-tensors": Format("compressed-tensors", "llm-compressor", "compressed-tensors"),
    "modelopt": Format("ModelOpt", "NVIDIA's Model Optimizer", "modelopt"),
    "modelopt_fp4": Format("ModelOpt NVFP4", "NVIDIA's Model Optimizer", "modelopt"),
    "mxfp4": Format("MXFP4", "OpenAI (gpt-oss) or transformers", "mxfp4"),
    "bitsandbytes": Format("bitsandbytes", "bitsandbytes", "bitsandbytes"),
    "hqq": Format("HQQ", "hqq", "hqq"),
    "gguf": Format("GGUF", "llama.cpp", "gguf"),
    "quark": Format("Quark", "AMD Quark", "vllm"),
    "torchao": Format("torchao", "torchao", "vllm"),
    "auto-round": Format("AutoRound", "Intel's AutoRound", "vllm"),
    "intel/auto-round": Format("AutoRound", "Intel's AutoRound", "vllm"),
    "inc": Format("AutoRound", "Intel Neural Compressor", "vllm"),
    "fbgemm_fp8": Format("FBGEMM FP8", "transformers", "vllm"),
    "fp_quant": Format("FP-Quant", "FP-Quant", "vllm"),
    "mxfp8": Format("MXFP8", "the model's vendor", "vllm"),
    "experts_int8": Format("INT8 experts", "vLLM itself, of 16-bit files", "vllm"),
    "exl2": Format("EXL2", "ExLlamaV2", elsewhere="ExLlamaV2 (TabbyAPI)"),
    "exl3": Format("EXL3", "ExLlamaV3", elsewhere="ExLlamaV3 (TabbyAPI)"),
    "aqlm": Format("AQLM", "AQLM", elsewhere=_TRANSFORMERS.format("aqlm")),
    "quip#": Format("QuIP#", "QuIP#", elsewhere="its own repository, Cornell-RelaxML/quip-sharp"),
    "qtip": Format("QTIP", "QTIP", elsewhere="its own repository, Cornell-RelaxML/qtip"),
    "vptq": Format("VPTQ", "VPTQ", elsewhere=_TRANSFORMERS.format("vptq")),
    "spqr": Format("SpQR", "SpQR", elsewhere=_TRANSFORMERS.format("spqr_quant")),
    "higgs": Format("HIGGS", "transformers", elsewhere=_TRANSFORMERS.format("flute-kernel")),
    "quanto": Format("Quanto", "optimum-quanto", elsewhere=_TRANSFORMERS.format("optimum-quanto")),
    "eetq": Format("EETQ", "transformers", elsewhere=_TRANSFORMERS.format("kernels")),
    "bitnet": Format("BitNet", "Microsoft or transformers", elsewhere="transformers, or bitnet.cpp"),
    "mlx": Format("MLX", "mlx-lm", elsewhere="mlx-lm on Apple silicon"),
}
"""By the name that ``quant_method`` has, or would have."""

_TAILS: tuple[tuple[str, str], ...] = (
    ("suh", "exl3"), ("Qidxs", "quip#"), ("tlut", "qtip"), ("q_invperm", "exl2"), ("codebooks", "aqlm"),
    ("col_vals", "spqr"), ("lookup_table", "squeezellm"),
    ("W_q", "hqq"), ("quant_map", "bitsandbytes"), ("SCB", "bitsandbytes"), ("gate_up_proj_blocks", "mxfp4"),
    ("weight_packed", "compressed-tensors"), ("weight_scale_2", "modelopt_fp4"), ("weight_scale_inv", "fp8"),
    ("g_idx", "gptq"), ("trellis", "exl3"),
)  # fmt: skip
"""Last parts of tensor names that one format alone has; the first that is there tells."""


def format_of(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """The quantization format of a checkpoint and where that is written; None when nothing tells.

    Returns:
        A name such as ``gptq`` in lower case, and ``quantization_config``, a file name or the name of a tensor.
    """
    if "hf_quant_config.json" in checkpoint.quant_files and not checkpoint.config.get("quantization_config"):
        quantization = checkpoint.quant_files["hf_quant_config.json"].get("quantization")
        algorithm = quantization.get("quant_algo") if isinstance(quantization, Mapping) else None
        return ("modelopt_fp4" if "FP4" in str(algorithm) else "modelopt"), "hf_quant_config.json"
    declared = checkpoint.quantization_config or {}
    method = declared.get("quant_method")
    if isinstance(method, str) and method.strip():
        name = method.strip().lower()
        if name == "modelopt" and "FP4" in str(declared.get("quant_algo")):
            name = "modelopt_fp4"
        return name, "quantization_config"
    mlx = checkpoint.config.get("quantization")
    if isinstance(mlx, Mapping) and "group_size" in mlx:
        return "mlx", "quantization in config.json"
    for name, values in checkpoint.quant_files.items():
        if name.endswith("quantize_config.json") and "bits" in values:
            return str(values.get("quant_method") or "gptq").lower(), name
        if name.endswith("quant_config.json") and "w_bit" in values:
            return "awq", name
    tails = {name.rpartition(".")[2]: name for name in checkpoint.tensors}
    found = next(((form, tails[tail]) for tail, form in _TAILS if tail in tails), None)
    return found or (_packed_integers(checkpoint, tails["qweight"]) if "qweight" in tails else None)


def _packed_integers(checkpoint: Checkpoint, name: str) -> tuple[str, str] | None:
    """GPTQ packs words along K and AWQ along N: the scales, [k / group, n], tell."""
    words, scales = checkpoint.tensors[name], checkpoint.tensors.get(f"{name.removesuffix('qweight')}scales")
    if scales is None or len(words.shape) != 2 or len(scales.shape) != 2:
        return None
    return ("gptq" if words.shape[1] == scales.shape[1] else "awq"), name


def format_title(name: str) -> str:
    """How a format is written in prose: ``GPTQ``."""
    return FORMATS[name].title if name in FORMATS else name[:40]


def plugin_of(name: str) -> str:
    """The plugin of this project for a format; the name itself of one that is not known."""
    return FORMATS[name].plugin or name if name in FORMATS else name


def who_serves(name: str, plugins: Collection[str]) -> str:
    """What writes a format and what serves it, of one that no installed plugin serves; "" for an unknown one.

    Args:
        name: the format.
        plugins: those that this project has.
    """
    known = FORMATS.get(name)
    said = [f"{known.tool} writes it"] if known else []
    if known and known.elsewhere:
        said.append(f"neither quantserve nor vLLM {VLLM} serves it, {known.elsewhere} does")
    elif plugin_of(name) in plugins:
        said.append(f"quantserve-{plugin_of(name)} serves it")
    elif name in quantization_methods():
        said.append(f"vLLM {VLLM} serves it by itself (`vllm serve MODEL`); quantserve has no plugin for it")
    return "; ".join(said)
