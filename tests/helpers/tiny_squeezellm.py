"""A tiny Llama and its SqueezeLLM files, made without the code under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, INNER, HEADS, KV_HEADS, HEAD, LAYERS, VOCABULARY = 256, 384, 4, 2, 64, 2, 512


def llama_config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
        **changes,
    }


def projections() -> dict[str, tuple[int, int]]:
    """Module path to (n, k) of every projection of the tiny model."""
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in shapes.items()}


def llama_state(seed: int = 0, bias: bool = False) -> dict[str, Any]:
    """Random weights whose logits spread enough for most greedy choices to be clear."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Any:
        return torch.randn(*shape, generator=g) * scale

    state = {
        "model.embed_tokens.weight": normal(VOCABULARY, HIDDEN, scale=1.0),
        "model.norm.weight": 1 + normal(HIDDEN, scale=0.1),
        "lm_head.weight": normal(VOCABULARY, HIDDEN, scale=3 * HIDDEN**-0.5),
    }
    for i in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{i}.{norm}.weight"] = 1 + normal(HIDDEN, scale=0.1)
    for module, (n, k) in projections().items():
        state[f"{module}.weight"] = normal(n, k, scale=k**-0.5)
        if bias and "self_attn" in module:
            state[f"{module}.bias"] = normal(n, scale=0.5)
    return state


def write_llama(folder: Path, *, bias: bool = False, dtype: Any = None, **config: Any) -> Path:
    """An ordinary float checkpoint of the tiny model."""
    folder.mkdir(parents=True)
    state = {name: tensor.to(dtype or torch.float32) for name, tensor in llama_state(bias=bias).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(llama_config(attention_bias=bias, **config)))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def pack_by_the_book(codes: list[list[int]], bits: int) -> Any:
    """Codes [n][k] to int32 words [k*bits/32, n]: one little-endian bit stream per channel, as Python integers."""
    columns = []
    for row in codes:
        stream = sum(code << (bits * k) for k, code in enumerate(row))
        words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(len(row) * bits // 32)]
        columns.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(columns, dtype=torch.int32).t().contiguous()


def original_state(bits: int, *, sparse: bool = False, whole: bool = True, seed: int = 1) -> dict[str, Any]:
    """A state dict as the original packer saves it, made without the code under test.

    The codebooks are unsorted and random. `sparse` adds CSR, start rows, two full rows and the nonzero counts;
    `whole=False` leaves only the quantized linears, as in the LLaMA-1 files.
    """
    g = torch.Generator().manual_seed(seed)
    state: dict[str, Any] = {}
    if whole:
        state = {name: tensor for name, tensor in llama_state().items() if "_proj" not in name}
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(HEAD // 2)
    for module, (n, k) in projections().items():
        codes = torch.randint(0, 2**bits, (n, k), generator=g)
        state[f"{module}.qweight"] = pack_by_the_book(codes.tolist(), bits)
        state[f"{module}.lookup_table"] = torch.randn(n, 2**bits, generator=g) * k**-0.5
        if sparse:
            where = torch.rand(n, k, generator=g) < 0.01
            where[0] = False  # an empty row
            nnz = int(where.sum())
            state[f"{module}.rows"] = torch.cat([torch.zeros(1), where.sum(1).cumsum(0)]).to(torch.int32)
            state[f"{module}.cols"] = where.nonzero()[:, 1].to(torch.int32)
            state[f"{module}.vals"] = torch.randn(nnz, generator=g) * 4 * k**-0.5
            state[f"{module}.startrows"] = torch.zeros(128, dtype=torch.int32)
            state[f"{module}.full_rows"] = torch.randn(k, 2, generator=g) * k**-0.5
            state[f"{module}.full_row_indices"] = torch.tensor([n - 1, 0], dtype=torch.int32)
            state[f"sparse_threshold.{module}"] = nnz
    return state


def write_original(folder: Path, state: dict[str, Any], wbits: int | None = None, config: Any = None) -> Path:
    """A folder as on the Hub: the .pt file, and config.json and quant_config.json when given."""
    folder.mkdir(parents=True)
    torch.save(state, folder / "sq-tiny.pt")
    if wbits is not None:
        (folder / "quant_config.json").write_text(json.dumps({"wbits": wbits}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer_config.json").write_text("{}")
    return folder
