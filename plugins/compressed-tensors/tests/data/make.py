"""Writes the checkpoints in this folder with llm-compressor: a random Llama, quantized without data.

Run with llmcompressor 0.14.0.1, compressed-tensors 0.19.0, transformers 5.19 and torch 2.13 (CPU):

    python make.py DESTINATION

The model is random, so the files have no author but this script; they are under the licence of this repository.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import LlamaConfig, LlamaForCausalLM

ATTENTION, MLP, DOWN = r"re:.*self_attn\.[qkvo]_proj$", r"re:.*mlp\.(gate|up)_proj$", r"re:.*mlp\.down_proj$"


def integers(bits: int, targets: list[str], group: int | None = 32, **options: object) -> QuantizationScheme:
    """Weights in integers, activations as they are."""
    strategy = "group" if group else "channel"
    weights = QuantizationArgs(num_bits=bits, type="int", strategy=strategy, group_size=group, **options)
    return QuantizationScheme(targets=targets, weights=weights)


RECIPES: dict[str, dict[str, Any]] = {
    # Three groups in one model: 4 bits with zeros, 8 bits per channel, 4 bits without zeros.
    "mixed": {
        "config_groups": {
            "attention": integers(4, [ATTENTION], symmetric=False),
            "mlp": integers(8, [MLP], None, symmetric=True),
            "down": integers(4, ["Linear"], symmetric=True),
        }
    },
    "w8a8": {"scheme": "W8A8", "targets": ["Linear"]},
    "fp8": {"scheme": "FP8_DYNAMIC", "targets": ["Linear"]},
    "fp8-block": {"scheme": "FP8_BLOCK", "targets": [ATTENTION, MLP, DOWN]},
    "nvfp4": {"scheme": "NVFP4A16", "targets": ["Linear"]},
    "mxfp4": {"scheme": "MXFP4A16", "targets": ["Linear"]},
}


def main(destination: Path) -> None:
    """Write a folder for every recipe."""
    torch.manual_seed(19)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.15,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        for name, recipe in RECIPES.items():
            model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            oneshot(model=model, recipe=QuantizationModifier(ignore=["lm_head"], **recipe))
            model.save_pretrained(destination / name, save_compressed=True)
            for other in ("recipe.yaml", "generation_config.json"):
                (destination / name / other).unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
