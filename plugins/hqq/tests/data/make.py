"""Write the checkpoints beside this file: hqq 0.2.8.post1 and torch 2.13.0 on a CPU, 2026-11-30.

    python make.py DESTINATION

Each linear of a random Llama is quantized by hqq's own HQQLinear, whose state_dict hqq and transformers save, and
config.json has what transformers' HqqConfig writes. transformers 5.19 refuses CPUs and has removed the loading of HQQ
files, so the model is saved with safetensors. Licence: CC0; the weights are random numbers.
"""

import json
import sys
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256,
    "max_position_embeddings": 256, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "uniform4": {"nbits": 4, "group_size": 32, "axis": 1},
    "mixed": {
        **{f"self_attn.{one}_proj": {"nbits": 3, "group_size": 32, "axis": 1} for one in "qkv"},
        "self_attn.o_proj": {"nbits": 8, "group_size": None, "axis": 1},
        "mlp.gate_proj": {"nbits": 2, "group_size": 16, "axis": 1, "view_as_float": True},
        "mlp.up_proj": {"nbits": 2, "group_size": 16, "axis": 1, "view_as_float": True},
    },  # down_proj stays as it is
}


def write(folder: Path, settings: dict, seed: int) -> None:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, initializer_range=0.15)).half()
    uniform = "nbits" in settings
    made = {} if uniform else {tag: BaseQuantizeConfig(**one) for tag, one in settings.items()}
    tensors, expected = {}, {}
    linears = {
        name: one for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and "layers" in name
    }
    for name, linear in linears.items():
        tag = ".".join(name.split(".")[-2:])
        config = BaseQuantizeConfig(**settings) if uniform else made.get(tag)
        if config is None:
            continue
        quantized = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
        tensors |= {f"{name}.{key}": value.clone() for key, value in quantized.state_dict().items()}
        expected[name] = quantized.dequantize().clone()
    gone = {f"{name}.weight" for name in expected} | {"lm_head.weight"}
    tensors |= {name: value.clone() for name, value in model.state_dict().items() if name not in gone}
    folder.mkdir(parents=True)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    save_file(expected, folder.parent / f"{folder.name}-dequantized.safetensors")
    quant_config = BaseQuantizeConfig(**settings) if uniform else made
    quantization = {"quant_config": quant_config, "quant_method": "hqq", "skip_modules": ["lm_head"]}
    config = {**CONFIG, "dtype": "float16", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    for seed, (name, settings) in enumerate(MODELS.items()):
        write(Path(sys.argv[1]) / name, settings, seed)
