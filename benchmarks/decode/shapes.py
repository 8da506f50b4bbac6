"""The synthetic models: shapes of a Llama, and the checkpoints that are made of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.console import BUILD


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads

    def projections(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of the seven linears of a layer, by their name inside the layer."""
        kv = self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights in the linears of all layers: what quantization shrinks."""
        return self.layers * sum(n * k for n, k in self.projections().values())

    @property
    def parameters(self) -> int:
        """All weights: linears, norms, embedding and (untied) output."""
        return self.linear_parameters + (2 * self.layers + 1) * self.hidden + 2 * self.vocab * self.hidden

    def config(self) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }

    @property
    def folder(self) -> Path:
        """Where its checkpoints are."""
        return BUILD / "models" / self.name

    def checkpoint(self, kind: str) -> Path:
        """The checkpoint of one kind: a folder, or the GGUF file."""
        return self.folder / (f"{kind}.gguf" if kind in GGUF else kind)


GGUF = {"q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0", "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}
"""Kind of file -> llama.cpp's preset."""
# 838,924,288 parameters, 707,788,800 of them in the linears: as wide as TinyLlama-1.1B, with two thirds of its layers.
FULL = Shape("llama-0.84b", hidden=2048, intermediate=5632, layers=15, heads=16, kv_heads=8, vocab=32000)
# Seconds instead of minutes, to see that everything runs; its figures mean nothing.
QUICK = Shape("llama-quick", hidden=256, intermediate=768, layers=2, heads=4, kv_heads=2, vocab=2048)


def size(path: Path) -> int:
    """Bytes of a checkpoint's weights: the safetensors of a folder, or the file."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else path.stat().st_size
