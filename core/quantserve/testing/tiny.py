"""Small checkpoints: a Llama with values for quantizers, and one with the tensors of a scheme."""

from __future__ import annotations

import json
import random
import struct
from array import array
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Final

from quantserve.api import Checkpoint, Linear, Scheme, linears
from quantserve.checkpoint.data import DTYPE_BITS

Spec = tuple[str, tuple[int, ...]]
"""Name of a dtype as in safetensors, and a shape."""
TOKENIZER: Final = {"present": True, "max_token_id": 255, "has_chat_template": True}
"""What a checkpoint with a tokenizer tells of it."""


def llama_config(hidden: int, intermediate: int, layers: int = 2) -> dict[str, Any]:
    """config.json of a small Llama with 8 heads of keys and values, which 8 ranks can share.

    vLLM's attention on CPUs has no heads with fewer than 32 numbers.
    """
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": 8,
        "num_key_value_heads": 8, "head_dim": max(32, hidden // 8), "vocab_size": 256, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1,
        "eos_token_id": 2, "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32",
    }  # fmt: skip


def llama_tensors(config: Mapping[str, Any], dtype: str = "F32") -> dict[str, Spec]:
    """The tensors of such a Llama, unquantized."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    made: dict[str, Spec] = {"model.embed_tokens.weight": (dtype, (vocab, hidden))}
    for linear in linears(Checkpoint.from_tensors(config)):
        made[f"{linear.name}.weight"] = (dtype, (linear.n, linear.k))
    for layer in range(config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"model.layers.{layer}.{norm}.weight"] = (dtype, (hidden,))
    return made | {"model.norm.weight": (dtype, (hidden,)), "lm_head.weight": (dtype, (vocab, hidden))}


def write_llama(folder: Path, *, hidden: int = 128, intermediate: int = 256, seed: int = 0) -> Path:
    """Write a Llama of two layers with random float32 weights, for a quantizer; gives the folder.

    Args:
        folder: made where it is missing.
        hidden: its hidden size, a multiple of 16.
        intermediate: of its feed-forward layers.
        seed: of the weights, which are normal with a standard deviation of 0.15, and 1 in norms.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, numbers = llama_config(hidden, intermediate), random.Random(seed)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, (dtype, shape) in llama_tensors(config).items():
        values = array("f", [1.0]) * shape[0] if len(shape) == 1 else _drawn(numbers, shape)
        header[name] = {
            "dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + 4 * len(values)]
        }  # fmt: skip
        data += values.tobytes()
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of 256 tokens, one for each byte, which transformers loads, into the folder of a checkpoint."""
    names = {byte: chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    names |= {byte: chr(256 + n) for n, byte in enumerate(byte for byte in range(256) if byte not in names)}
    bytes_of_text = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0", "added_tokens": [], "pre_tokenizer": bytes_of_text, "decoder": bytes_of_text,
        "model": {"type": "BPE", "vocab": {names[byte]: byte for byte in range(256)}, "merges": []},
    }  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")


def _drawn(numbers: random.Random, shape: tuple[int, ...]) -> array[float]:
    """Normal numbers: each row [k] begins at a random place of a few thousand, because drawing all takes seconds."""
    made, k = array("f"), shape[-1]
    pool = array("f", (numbers.gauss(0, 0.15) for _ in range(4096 + k)))
    for _ in range(prod(shape[:-1])):
        begin = numbers.randrange(4096)
        made += pool[begin : begin + k]
    return made


def quantized_tensors(linear: Linear, scheme: Scheme) -> dict[str, Spec]:
    """The tensors of a linear in a scheme, by name: of alternatives the first, without those of unknown length.

    Raises:
        ValueError: no tensor of the scheme has this size.
    """
    made: dict[str, Spec] = {}
    for suffix in scheme.parts:
        part = scheme.alternatives(suffix)[0]
        if part.optional:
            continue
        sizes = part.sizes(linear.n, linear.k, linear.experts)
        if None in sizes or part.dtypes[0] not in DTYPE_BITS:
            raise ValueError(f"{suffix} has no size for a linear [{linear.n}, {linear.k}]")
        made[f"{linear.name}.{suffix}"] = (part.dtypes[0], tuple(size for size in sizes if size is not None))
    return made
