"""Write the folders beside this file with NVIDIA's Model Optimizer: `quantize` and `export_hf_checkpoint`.

    pip install nvidia-modelopt==0.47.0    # with transformers 5.19.0 and torch 2.13.0
    python make.py                         # on a CPU

The weights are random (seed 0). ``rounded/NAME.safetensors`` holds the first rows of the weights in float32, as the
tool's own `dequantize` reads them. `fp8` gets the files that the tool wrote up to 0.29: hf_quant_config.json alone. The
files are Apache-2.0, as this repository.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP8QTensor, NVFP4QTensor
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

HERE = Path(__file__).parent
ROWS = 4
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
MIXTURE = SMALL | {
    "num_hidden_layers": 2,
    "moe_intermediate_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 4,  # all of them, as in bfloat16 a near tie of the router may choose others
    "norm_topk_prob": True,
    "vocab_size": 256,
}


def with_cache(config: dict[str, Any]) -> dict[str, Any]:
    """The same with an FP8 KV cache."""
    return mtq.update_quant_cfg_with_kv_cache_quant(config, copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"]))


def mixed() -> dict[str, Any]:
    """FP8, and NVFP4 for the MLP."""
    config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    for one in copy.deepcopy(mtq.NVFP4_MLP_ONLY_CFG["quant_cfg"]):
        if "mlp" in one["quantizer_name"]:
            config["quant_cfg"].append(one)
    return config


def write(name: str, settings: dict[str, Any], *, mixture: bool = False, old: bool = False, **sizes: int) -> None:
    """Quantize a random model and export it to the folder `name`."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**MIXTURE) if mixture else LlamaConfig(**SMALL | sizes)
    kind = Qwen3MoeForCausalLM if mixture else LlamaForCausalLM
    config.architectures = [kind.__name__]
    model = kind(config).to(torch.bfloat16)

    def calibrate(model: torch.nn.Module) -> None:
        for _ in range(4):
            model(torch.randint(0, config.vocab_size, (2, 32)))

    model = mtq.quantize(model, copy.deepcopy(settings), calibrate)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    with torch.no_grad():
        export_hf_checkpoint(model, export_dir=folder)
    (folder / "generation_config.json").unlink()
    rounded = read(load_file(folder / "model.safetensors"))
    (HERE / "rounded").mkdir(exist_ok=True)
    save_file(
        {name: one.detach()[:ROWS].contiguous() for name, one in rounded.items()},
        HERE / "rounded" / f"{name}.safetensors",
    )
    if old:
        written = json.loads((folder / "config.json").read_text())
        del written["quantization_config"]
        (folder / "config.json").write_text(json.dumps(written, indent=4) + "\n")


def read(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The quantized weights of a file in float32, by the tool's own `dequantize`."""
    found = {}
    for name, weight in tensors.items():
        scale, shape = tensors.get(f"{name}_scale"), list(weight.shape)
        if scale is not None and weight.dtype == torch.uint8:
            double = tensors[f"{name}_scale_2"]
            made = NVFP4QTensor(torch.Size((shape[0], 2 * shape[1])), torch.float32, weight)
            found[name] = made.dequantize(scale=scale, double_scale=double, block_sizes={-1: 16})
        elif scale is not None and scale.dtype == torch.uint8:
            found[name] = MXFP8QTensor(weight.shape, torch.float32, weight).dequantize(scale=scale)
        elif scale is not None:
            blocks = {0: 128, 1: 128} if scale.ndim == 4 else None
            scale = scale[:, 0, :, 0] if scale.ndim == 4 else scale[:, None] if scale.ndim == 1 else scale
            found[name] = FP8QTensor(weight.shape, torch.float32, weight).dequantize(scale=scale, block_sizes=blocks)
    return found


def main() -> None:
    """Every algorithm that the tool exports on a CPU and vLLM 0.32 serves."""
    write("fp8", mtq.FP8_DEFAULT_CFG, old=True)
    write("fp8-channel", mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG)
    write(
        "fp8-block", mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG, num_key_value_heads=4
    )  # the scale of one block has no shape
    write("mxfp8", mtq.MXFP8_DEFAULT_CFG)
    write("nvfp4", with_cache(copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)))
    write("w4a16", mtq.W4A16_NVFP4_CFG)
    write("mixed", mixed())
    write("qwen3-moe", with_cache(copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)), mixture=True)


if __name__ == "__main__":
    main()
