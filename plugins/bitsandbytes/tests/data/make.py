"""Write the checkpoints beside this file: transformers 5.19.0, bitsandbytes 0.50.2, torch 2.13.0 on a CPU, 2026-11-30.

    python make.py DESTINATION

transformers quantizes a random Llama and saves it; bitsandbytes dequantizes it. `nf4` leaves a module out, as Unsloth's
dynamic files do. Of the others the first layer is dequantized. Licence: CC0; the weights are random numbers.
"""

import sys
import tempfile
from pathlib import Path

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256, "max_position_embeddings": 256,
    "tie_word_embeddings": True, "initializer_range": 0.15,
}  # fmt: skip
MODELS = {
    "nf4": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp.down_proj"],
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
}  # fmt: skip


def weight(module: torch.nn.Module) -> torch.Tensor:
    """As bitsandbytes dequantizes it, in float32."""
    if isinstance(module, Linear8bitLt):
        return functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    state = module.weight.quant_state
    state.dtype = torch.float32
    return functional.dequantize_4bit(module.weight.data, state)


def main(destination: Path) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as plain:
        LlamaForCausalLM(LlamaConfig(**SIZES)).half().save_pretrained(plain)
        for name, settings in MODELS.items():
            config = BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=torch.float16)
            model = LlamaForCausalLM.from_pretrained(
                plain, quantization_config=config, dtype=torch.float16, device_map="cpu"
            )
            model.save_pretrained(destination / name)
            (destination / name / "generation_config.json").unlink()
            quantized = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit | Linear8bitLt)}
            expected = {n: weight(m) for n, m in quantized.items() if name == "nf4" or "layers.0." in n}
            save_file(expected, destination / f"{name}-dequantized.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
