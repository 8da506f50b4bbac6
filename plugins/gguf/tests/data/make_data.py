"""Writes the files of this folder: python make_data.py

Made on 2026-11-30 with gguf 0.19.0 (MIT, github.com/ggml-org/llama.cpp/tree/master/gguf-py), transformers 5.19 and
torch 2.13. The weights are random numbers; these files are Apache-2.0 as this project.

- ``blocks.safetensors``: for each type ``TYPE.blocks`` uint8 [rows, bytes] and ``TYPE.values`` float32 [rows, elements]
  as gguf dequantizes them. gguf quantizes Q4_0 to Q8_0; the others, which only llama.cpp quantizes, are random bytes
  with finite scales.
- ``FAMILY.gguf`` and ``reference.safetensors``: models of two layers, written with gguf's writer from models of
  transformers, and the logits [tokens, vocabulary] of transformers' own reader of GGUF files in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from gguf import quants
from safetensors.torch import save_file

HERE = Path(__file__).parent
LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
TOKENS = torch.tensor([[3, 17, 5, 60, 22, 41, 8, 8, 30, 12, 55, 2]])
VOCABULARY = 64
ARCHITECTURES = {
    "llama": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "phi3": "PHI3",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
}
RNG = np.random.default_rng(19)


def blocks_of(weight: np.ndarray, name: str) -> np.ndarray:
    """A weight [n, k] as bytes [n, bytes of a row]; types that gguf cannot write get random codes of that size."""
    if name in LEGACY or name in ("F32", "F16"):
        return quants.quantize(weight, Type[name])
    elements, nbytes = gguf.GGML_QUANT_SIZES[Type[name]]
    n, k = weight.shape
    raw = RNG.integers(0, 256, (n, k // elements, nbytes), dtype=np.uint8)
    size = {"Q2_K": 2e-3, "Q3_K": 5e-4, "Q4_K": 1e-4, "Q5_K": 5e-5, "Q6_K": 2e-5, "IQ4_NL": 1e-3, "IQ4_XS": 5e-5}[name]
    for place, at in enumerate(HALVES[name]):
        scale = np.full(raw.shape[:2], size * (1 if place == 0 else 2), np.float16) * RNG.uniform(
            0.5, 1.5, raw.shape[:2]
        ).astype(np.float16)
        raw[..., at : at + 2] = scale[..., None].view(np.uint8)
    return raw.reshape(n, -1)


def write_blocks() -> None:
    made = {}
    for name in (*LEGACY, *HALVES):
        raw = blocks_of(RNG.standard_normal((3, 512)).astype(np.float32), name)
        if name in ("Q4_1", "Q5_1"):
            raw[0, :2] = 0  # a constant block: scale 0
        if name in ("Q4_K", "Q5_K"):
            raw[0, 4:16] = [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12]  # a group whose scale is 0
        made[f"{name}.blocks"] = torch.from_numpy(raw)
        made[f"{name}.values"] = torch.from_numpy(quants.dequantize(raw, Type[name]))
    save_file(made, HERE / "blocks.safetensors")


def configs() -> dict[str, transformers.PretrainedConfig]:
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    small = {**common, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    gemma = {**small, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 4}
    return {
        "llama": transformers.LlamaConfig(
            **{**common, "hidden_size": 256, "intermediate_size": 256, "vocab_size": 256},
            tie_word_embeddings=False,
            rms_norm_eps=1e-5,
        ),
        "qwen2": transformers.Qwen2Config(
            **{k: v for k, v in small.items() if k != "head_dim"}, tie_word_embeddings=True
        ),
        "qwen3": transformers.Qwen3Config(**{**small, "head_dim": 32}, tie_word_embeddings=False),
        "phi3": transformers.Phi3Config(
            **{k: v for k, v in small.items() if k != "head_dim"}, tie_word_embeddings=False
        ),
        "gemma2": transformers.Gemma2Config(**gemma),
        "gemma3_text": transformers.Gemma3TextConfig(**gemma),
    }


def type_of(family: str, name: str) -> str:
    """Mixed types in the Llama, as llama.cpp's own mixes have them; Q8_0 elsewhere."""
    if "norm" in name or name.endswith(".bias"):
        return "F32"
    if family != "llama":
        return "Q8_0"
    if name.startswith("blk.0"):
        return "Q6_K" if "attn_v" in name or "ffn_down" in name else "Q4_K"
    per = {
        "attn_q": "Q5_K",
        "attn_k": "Q5_K",
        "attn_v": "Q5_K",
        "attn_output": "Q3_K",
        "ffn_gate": "IQ4_NL",
        "ffn_up": "IQ4_XS",
        "ffn_down": "Q2_K",
        "output": "Q6_K",
        "token_embd": "Q4_1",
    }
    return per[name.split(".")[-2]]


def write_model(config: transformers.PretrainedConfig) -> None:
    family = config.model_type
    arch = gguf.MODEL_ARCH[ARCHITECTURES[family]]
    key = gguf.MODEL_ARCH_NAMES[arch]
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, value in model.named_parameters():
        with torch.no_grad():
            value.copy_(torch.randn_like(value) * (0.1 if "norm" in name else 0.15))
            if "norm" in name and "gemma" not in family:
                value.add_(1)
    writer = gguf.GGUFWriter(HERE / f"{key}.gguf", key)
    writer.add_name(f"tiny {key}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head)
    if family in ("qwen3", "gemma2", "gemma3_text"):
        writer.add_key_length(head)
        writer.add_value_length(head)
    if "gemma" in family:
        writer.add_sliding_window(config.sliding_window)
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    add_tokenizer(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        array = value.numpy()
        if family == "llama" and any(f".{one}_proj." in name for one in "qk"):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            array = (
                array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
                .swapaxes(1, 2)
                .reshape(array.shape)
            )
        if "norm" in name and "gemma" in family:
            array = array + 1
        kind = type_of(family, new)
        raw = blocks_of(array, kind) if kind != "F32" else array.astype(np.float32)
        writer.add_tensor(new, raw, raw_dtype=None if kind == "F32" else Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """Byte-level BPE: three special tokens, letters, one merge, and fillers."""
    letters = [chr(code) for code in range(ord("A"), ord("A") + 26)] + [
        chr(code) for code in range(ord("a"), ord("a") + 26)
    ]
    tokens = ["<pad>", "<s>", "</s>", *letters, "\u0120", "th", "\u010a", ".", ",", "!", "?", "0", "1"]
    tokens += [f"x{index}" for index in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")


if __name__ == "__main__":
    write_blocks()
    reference = {"tokens": TOKENS[0]}
    for made in configs().values():
        write_model(made)
        file = f"{gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[ARCHITECTURES[made.model_type]]]}"
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            HERE, gguf_file=f"{file}.gguf", config=made, dtype=torch.float32
        )
        with torch.no_grad():
            reference[file] = loaded(TOKENS).logits[0].contiguous()
        print(file, reference[file].std(), loaded.config.to_diff_dict())
    save_file(reference, HERE / "reference.safetensors")
