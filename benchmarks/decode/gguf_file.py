"""Write the GGUF file of a bf16 checkpoint and let llama.cpp quantize it, with its own preset and code.

Runs in llama.cpp's virtual environment, which has gguf, numpy and llama_cpp, and no torch:
`-m benchmarks.decode.gguf_file CHECKPOINT FILE PRESET`. The rows of q_proj and k_proj stay in Hugging Face's order:
wrong for a real model, the same speed for random weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found]
import llama_cpp  # type: ignore[import-not-found]
import numpy as np

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_bf16(checkpoint: Path, path: Path) -> None:
    """The checkpoint as it is, in GGUF; the weights pass through mapped memory."""
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, raw, shape in bf16_tensors(file):
            if len(shape) == 1:
                wide = raw.view(np.uint16).astype(np.uint32) << 16
                writer.add_tensor(gguf_name(name), wide.view(np.float32))
            else:
                rows = raw.reshape(shape[0], -1)
                writer.add_tensor(gguf_name(name), rows, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bf16_tensors(file: Path) -> Iterator[tuple[str, Any, list[int]]]:
    """Name, bytes and shape of every tensor of a safetensors file in bf16."""
    data = np.memmap(file, mode="r", dtype=np.uint8)
    length = int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8 : 8 + length].tobytes())
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["dtype"] == "BF16", name
            first, last = (8 + length + offset for offset in entry["data_offsets"])
            yield name, data[first:last], entry["shape"]


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    if name in NAMES:
        return NAMES[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.weight"


def main(checkpoint: Path, path: Path, preset: str) -> None:
    """Write `path`; whole or not at all."""
    wide, draft = path.with_suffix(".bf16.part"), path.with_suffix(".part")
    try:
        write_bf16(checkpoint, wide)
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, preset)
        parameters.nthread = 1
        if llama_cpp.llama_model_quantize(str(wide).encode(), str(draft).encode(), parameters):
            raise SystemExit(f"llama.cpp could not quantize {wide.name}")
        draft.rename(path)
    finally:
        for file in (wide, draft):
            file.unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
