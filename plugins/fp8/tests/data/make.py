"""Write qwen3-moe-fp8 with transformers' own FP8 quantizer (`Fp8Quantize`, blocks of 128 x 128).

    python make.py            # transformers 5.19.0, torch 2.13.0, on a CPU

The weights are random (seed 0). transformers quantizes whole models on GPUs only, so its operation is applied here to
each linear. The files are Apache-2.0, as this repository.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Quantize

HERE = Path(__file__).parent / "qwen3-moe-fp8"
LAYERS = 2


def main() -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        vocab_size=256,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    skipped = ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(LAYERS))]
    settings = FineGrainedFP8Config(weight_block_size=(128, 128), modules_to_not_convert=skipped)
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=settings))
    with TemporaryDirectory() as folder:
        Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        tensors = load_file(Path(folder, "model.safetensors"))
        written = json.loads(Path(folder, "config.json").read_text())
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        linear = name.endswith("_proj.weight")
        result |= quantize.convert({name: tensor}) if linear else {name: tensor}
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    save_file({name: one.contiguous() for name, one in result.items()}, HERE / "model.safetensors", {"format": "pt"})
    written["quantization_config"] = settings.to_dict()
    (HERE / "config.json").write_text(json.dumps(written, indent=1, default=list) + "\n")


if __name__ == "__main__":
    main()
