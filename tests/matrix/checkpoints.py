"""Small checkpoints of every method, and the weights that they stand for in float32.

Files that the tools of the formats wrote, and their references, are those of the plugins' tests.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file

from helpers.plain import write_dequantized, write_plain
from helpers.quantized import awq, squeezellm
from helpers.tiny_squeezellm import write_llama
from quantserve_awq.quantizer import Awq
from quantserve_quantize.quantizer import Quantizer
from quantserve_squeezellm.quantizer import SqueezeLLM

PLUGINS = Path(__file__).parents[2] / "plugins"
BOTH = ("float16", "bfloat16")


class Case(NamedTuple):
    """A checkpoint.

    Attributes:
        name: of its plugin and its data.
        plugin: who serves it.
        what: for people.
        write: makes the checkpoint and its plain copy in a new folder, and returns both.
        dtypes: that the method serves.
    """

    name: str
    plugin: str
    what: str
    write: Callable[[Path], tuple[Path, Path]]
    dtypes: tuple[str, ...] = BOTH


def of_tool(plugin: str, data: str, what: str, file: str = "test_engine.py", **more: Any) -> Case:
    """The data of a plugin's tests, and what `plain` of a test module makes of them."""

    def write(folder: Path) -> tuple[Path, Path]:
        tests = PLUGINS / plugin / "tests"
        return tests / "data" / data, module(tests / file).plain(tests / "data" / data, folder / "plain")

    return Case(f"{plugin} {data}", plugin, what, write, **more)


def module(path: Path) -> ModuleType:
    """A test module, imported by its path."""
    spec = importlib.util.spec_from_file_location(f"matrix_{path.parts[-3].replace('-', '_')}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def rounded(
    quantize: Callable[..., None], quantizer: type[Quantizer], what: str, *, mixture: bool = False, **options: Any
) -> Case:
    """A random model that a quantizer of this project rounded, and its own dequantization."""
    plugin = quantizer.__module__.split(".")[0].removeprefix("quantserve_")

    def write(folder: Path) -> tuple[Path, Path]:
        source, out = folder / "float", folder / "model"
        (write_mixture if mixture else write_llama)(source)
        quantize(source, out, **options)
        return out, write_dequantized(out, folder / "plain", quantizer)

    return Case(f"{plugin} {'experts' if mixture else 'dense'}", plugin, what, write)


def write_mixture(folder: Path) -> None:
    """A Qwen3-MoE with 2 of 4 experts for each token."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 2}
    config = transformers.Qwen3MoeConfig(
        vocab_size=512, initializer_range=0.09, max_position_embeddings=256, **sizes, **heads
    )
    transformers.Qwen3MoeForCausalLM(config).float().save_pretrained(folder)


def unquantized(folder: Path) -> tuple[Path, Path]:
    """A random Llama in bfloat16, which is its own reference."""
    write_llama(folder / "model", dtype=torch.bfloat16)
    return folder / "model", folder / "model"


def four_bits(folder: Path) -> tuple[Path, Path]:
    """FP4 of bitsandbytes: every weight is its entry of the table times the absmax of its block of 64."""
    data = PLUGINS / "bitsandbytes" / "tests" / "data" / "fp4"
    stored, weights = load_file(data / "model.safetensors"), {}
    for name, tensor in stored.items():
        if f"{name}.quant_map" in stored:
            octets = tensor.view(torch.uint8).flatten().long()
            values = stored[f"{name}.quant_map"][torch.stack((octets >> 4, octets & 15), dim=1).flatten()]
            state = json.loads(bytes(stored[f"{name}.quant_state.bitsandbytes__fp4"].tolist()))
            weights[name] = (values.view(-1, 64) * stored[f"{name}.absmax"][:, None]).view(state["shape"])
        elif ".weight." not in name:
            weights[name] = tensor
    return data, write_plain(data, folder / "plain", weights)


LAYERS = "test_layers.py"
EVERY = (
    Case("fp16 dense", "fp16", "Llama", unquantized),
    rounded(awq, Awq, "4 bits, groups of 32", group_size=32),
    rounded(awq, Awq, "the same, Qwen3-MoE", group_size=32, mixture=True),
    of_tool("gptq", "autoround-w4g32-sym", "4 bits, symmetric"),
    of_tool("gptq", "autoround-w3g32-asym", "3 bits, zeros"),
    rounded(squeezellm, SqueezeLLM, "3 bits, 0.5 % sparse", bits=3, sparsity=0.5),
    rounded(squeezellm, SqueezeLLM, "4 bits, Qwen3-MoE", bits=4, experts=True, mixture=True),
    of_tool("fp8", "qwen3-moe-fp8", "blocks of 128 x 128, Qwen3-MoE"),
    of_tool("compressed-tensors", "mixed", "integers of several widths"),
    of_tool("compressed-tensors", "fp8", "FP8"),
    of_tool("compressed-tensors", "nvfp4", "NVFP4"),
    of_tool("compressed-tensors", "mxfp4", "MXFP4"),
    of_tool("compressed-tensors", "mixture", "FP8, MXFP4, integers and NVFP4, Qwen3-MoE"),
    of_tool("bitsandbytes", "nf4", "NF4, double quantization", LAYERS),
    Case("bitsandbytes fp4", "bitsandbytes", "FP4", four_bits),
    of_tool("modelopt", "fp8", "FP8"),
    of_tool("modelopt", "nvfp4", "NVFP4"),
    of_tool("modelopt", "qwen3-moe", "NVFP4, Qwen3-MoE"),
    of_tool("mxfp4", "gpt-oss", "gpt-oss", dtypes=("bfloat16",)),
    of_tool("hqq", "mixed", "2, 3, 4 and 8 bits", LAYERS),
    of_tool("gguf", "llama.gguf", "nine types"),
)
CASES = {case.name: case for case in EVERY}
