"""Write gpt-oss: a random gpt-oss whose experts are MXFP4, quantized by Triton's own `downcast_to_mxfp_torch`.

    pip install --no-deps tokenspeed-triton-kernels==1.0.0.post20260510    # a build of Triton's triton_kernels
    python make.py            # transformers 5.19.0, torch 2.13.0, triton 3.9.0, on a CPU

transformers' Mxfp4 quantizer calls that function, but stores its result for GPUs and needs a kernel from the hub. So
the experts are quantized here and stored under the names and shapes of openai/gpt-oss-20b. One block is zero, whose
exponent is 0. The weights are random (seed 0), and the files are Apache-2.0, as this repository.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config
from triton_kernels.numerics_details.mxfp import downcast_to_mxfp_torch

HERE = Path(__file__).parent / "gpt-oss"
STACKS = ("gate_up_proj", "down_proj")
PLAIN = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def main() -> None:
    torch.manual_seed(0)
    config = GptOssConfig(
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=256,
        max_position_embeddings=256,
        sliding_window=16,
        initializer_range=0.15,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 128,
            "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        },
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")):  # which are zero at first
            torch.nn.init.normal_(parameter, std=1.0 if name.endswith("sinks") else 0.1)
    model.lm_head.weight.data *= 3  # so that tokens are told apart
    with TemporaryDirectory() as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tensors = load_file(Path(folder, "model.safetensors"))
        written = json.loads(Path(folder, "config.json").read_text())
    for name in [name for name in tensors if name.endswith(STACKS)]:
        weight = tensors.pop(name).transpose(1, 2).contiguous()  # [e, n, k]
        weight[0, 0, :32] = 0
        blocks, scales = downcast_to_mxfp_torch(weight, torch.uint8, axis=2)
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks.view(*scales.shape, 16), scales
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    save_file({name: one.contiguous() for name, one in tensors.items()}, HERE / "model.safetensors", {"format": "pt"})
    written["quantization_config"] = Mxfp4Config(modules_to_not_convert=PLAIN).to_dict()
    (HERE / "config.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
