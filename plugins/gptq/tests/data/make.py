"""Wrote the checkpoints beside this file: python make.py. Needs auto-round and transformers.

Two Llamas of two layers with random weights, rounded to nearest by AutoRound 0.16.1 (Apache-2.0) and exported as
``auto_gptq``, and ``reference.json``: the SHA-256 of each linear's weight in bfloat16 as AutoRound dequantizes it
(its format ``fake``; -0 as 0). Written with torch 2.13 and transformers 5.19 on 2026-11-30. The weights are ours:
Apache-2.0.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent


def export(bits: int, sym: bool, form: str) -> Path:
    """Quantize the model and write it; the folder of the files."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).to(torch.float16)
    words = {name: index for index, name in enumerate(("<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, 128))))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    rounding = AutoRound(
        model, fast, bits=bits, group_size=32, sym=sym, iters=0, disable_opt_rtn=True, device_map="cpu"
    )
    folder = Path(tempfile.mkdtemp())
    rounding.quantize_and_save(str(folder), format=form)
    return next(path.parent for path in folder.rglob("config.json"))


if __name__ == "__main__":
    digests = {}
    for name, bits, sym in (("autoround-w4g32-sym", 4, True), ("autoround-w3g32-asym", 3, False)):
        shutil.copytree(export(bits, sym, "auto_gptq"), HERE / name, dirs_exist_ok=True)
        weights = load_file(export(bits, sym, "fake") / "model.safetensors")
        digests[name] = {
            module: hashlib.sha256((tensor + 0).view(torch.uint8).numpy().tobytes()).hexdigest()
            for module, tensor in weights.items()
            if module.endswith("_proj.weight")
        }
    (HERE / "reference.json").write_text(json.dumps(digests, indent=1) + "\n")
