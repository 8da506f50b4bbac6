"""Writes the checkpoints in this folder with llm-compressor: random models, quantized without data.

Run with llmcompressor 0.14.0.1, compressed-tensors 0.19.0, transformers 5.19 and torch 2.13 (CPU):

    python make.py DESTINATION

``reference.json`` has the SHA-256 of each linear's weight as compressed-tensors dequantizes it, in bfloat16 (-0 as 0).
The models are random, so the files have no author but this script; they are under the licence of this repository.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

ATTENTION, MLP, DOWN = r"re:.*self_attn\.[qkvo]_proj$", r"re:.*mlp\.(gate|up)_proj$", r"re:.*mlp\.down_proj$"
EXPERTS = r"re:.*experts\.\d+\..*_proj$"
TOKENS = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)


def group(targets: list[str], inputs: QuantizationArgs | None = None, **weights: Any) -> QuantizationScheme:
    """Weights, and activations as they are where there are no `inputs`."""
    return QuantizationScheme(targets=targets, weights=QuantizationArgs(**weights), input_activations=inputs)


def integers(bits: int, targets: list[str], group_size: int | None = 32, **options: Any) -> QuantizationScheme:
    """Weights in integers, activations as they are."""
    strategy = "group" if group_size else "channel"
    return group(targets, num_bits=bits, type="int", strategy=strategy, group_size=group_size, **options)


def floats(bits: int, targets: list[str], group_size: int, scales: torch.dtype, **options: Any) -> QuantizationScheme:
    """Weights in FP4 or FP8 with scales of a dtype, activations as they are."""
    options |= {"group_size": group_size, "scale_dtype": scales, "zp_dtype": scales}
    return group(targets, num_bits=bits, type="float", **options)


RECIPES: dict[str, dict[str, Any]] = {
    # Three groups in one model: 4 bits with zeros, 8 bits per channel, 4 bits without zeros.
    "mixed": {
        "config_groups": {
            "attention": integers(4, [ATTENTION], symmetric=False),
            "mlp": integers(8, [MLP], None, symmetric=True),
            "down": integers(4, ["Linear"], symmetric=True),
        }
    },
    # Widths that do not divide 32.
    "odd": {
        "config_groups": {
            "attention": integers(3, [ATTENTION], symmetric=False),
            "mlp": integers(6, [MLP], None, symmetric=True),
            "down": integers(2, [DOWN], 64, symmetric=False),
        }
    },
    "w8a8": {"scheme": "W8A8", "targets": ["Linear"]},
    "fp8": {"scheme": "FP8_DYNAMIC", "targets": ["Linear"]},
    "fp8-block": {"scheme": "FP8_BLOCK", "targets": [ATTENTION, MLP, DOWN]},
    "nvfp4": {"scheme": "NVFP4A16", "targets": ["Linear"]},
    "mxfp4": {"scheme": "MXFP4A16", "targets": ["Linear"]},
    # A mixture: FP8 attention with a scale for each tensor, a dense layer in MXFP4 and 4 bits, experts in NVFP4.
    "mixture": {
        "config_groups": {
            "attention": group([ATTENTION], TOKENS, num_bits=8, type="float", strategy="tensor"),
            "mlp": floats(4, [MLP], 32, torch.uint8, strategy="group"),
            "down": integers(4, [DOWN], symmetric=False),
            "experts": floats(4, [EXPERTS], 16, torch.float8_e4m3fn, strategy="tensor_group"),
        }
    },
}
SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False, "initializer_range": 0.15,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def model_of(name: str) -> PreTrainedModel:
    """The unquantized model of a recipe, the same in every run."""
    torch.manual_seed(19)
    if name != "mixture":
        return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=512))
    config = Qwen3MoeConfig(
        **SIZES, head_dim=32, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
        mlp_only_layers=[0], vocab_size=256,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def digests(folder: Path) -> dict[str, str]:
    """The digest of every dequantized weight."""
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values()
    tensors, found = load_file(folder / "model.safetensors"), {}
    for module in sorted(name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")):
        stored = {name.rpartition(".")[2]: one for name, one in tensors.items() if name.rpartition(".")[0] == module}
        entry = next(one for one in groups if any(matches(target, module) for target in one["targets"]))
        scheme = QuantizationScheme(**{key: entry[key] for key in ("targets", "weights", "input_activations")})
        if entry["weights"]["strategy"] == "block":  # decompress() takes one block of all rows for a group
            weight = dequantize(stored["weight"], stored["weight_scale"], args=scheme.weights)
        else:
            compressor = BaseCompressor.get_value_from_registry(entry["format"])
            weight = compressor.decompress(stored, scheme)["weight"]
        octets = (weight.to(torch.bfloat16) + 0).view(torch.uint8).numpy().tobytes()
        found[module] = hashlib.sha256(octets).hexdigest()
    return found


def matches(target: str, module: str) -> bool:
    """Whether a target of the recipes names a module."""
    return target == "Linear" or re.match(target[3:], module) is not None


def main(destination: Path) -> None:
    """Write a folder for every recipe, and the reference."""
    reference = {}
    for name, recipe in RECIPES.items():
        ignore = ["lm_head", r"re:.*mlp\.gate$"] if name == "mixture" else ["lm_head"]
        with TemporaryDirectory() as folder:
            model = model_of(name).to(torch.bfloat16)
            model.save_pretrained(folder)
            model = type(model).from_pretrained(folder, dtype=torch.bfloat16)
            oneshot(model=model, recipe=QuantizationModifier(ignore=ignore, **recipe))
            model.save_pretrained(destination / name, save_compressed=True)
        for other in ("recipe.yaml", "generation_config.json"):
            (destination / name / other).unlink(missing_ok=True)
        reference[name] = digests(destination / name)
    (destination / "reference.json").write_text(json.dumps(reference, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
