"""Synthetic checkpoints for tests: real files and headers, no weights.

The data section of every safetensors file is a hole (``truncate``), so a 140 GB checkpoint takes a few MB of disk and
under a second to make. Nothing here imports torch, numpy or quantserve.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

Spec = tuple[str, tuple[int, ...]]
"""(safetensors dtype name, shape)"""

DTYPE_BITS: Final[dict[str, int]] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip

REMOVE: Final[object] = object()
"""As a value of ``make_llama(config=...)``: leave this key out of config.json."""

LLAMA_70B: Final[dict[str, Any]] = {
    "layers": 80, "hidden": 8192, "intermediate": 28672, "heads": 64, "kv_heads": 8, "vocab": 32000, "shards": 15,
}  # fmt: skip
"""``make_llama(path, "awq", **LLAMA_70B)``"""

LLAMA_7B: Final[dict[str, Any]] = {
    "layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "kv_heads": 32, "vocab": 32000, "shards": 2,
}  # fmt: skip

CHAT_TEMPLATE: Final[str] = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


def nbytes(spec: Spec) -> int:
    """Bytes of one tensor."""
    count = DTYPE_BITS[spec[0]]
    for size in spec[1]:
        count *= size
    return count // 8


def safetensors_header(tensors: Mapping[str, Spec], metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The JSON object of a valid file that stores `tensors` one after the other."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + nbytes((dtype, shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    return header


def write_header(path: Path, header: object, data_bytes: int = 0, *, declared_length: int | None = None) -> Path:
    """Write any header (object or raw bytes), valid or not, followed by `data_bytes` zero bytes as a hole."""
    raw = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    length = len(raw) if declared_length is None else declared_length
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length) + raw)
        file.truncate(8 + len(raw) + data_bytes)
    return path


def write_safetensors(
    path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a valid safetensors file whose data are zeros in a sparse file."""
    specs = {name: (dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}
    header = safetensors_header(specs, {"format": "pt"} if metadata is None else metadata)
    return write_header(path, header, sum(map(nbytes, specs.values())))


def read_header(file: Path) -> dict[str, Spec]:
    """The tensors of a safetensors file."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
    return {name: (one["dtype"], tuple(one["shape"])) for name, one in header.items() if name != "__metadata__"}


def variant(
    folder: Path,
    source: Path,
    tensors: Mapping[str, Spec | None] | None = None,
    config: Mapping[str, Any] | None = None,
    **quantization: Any,
) -> Path:
    """A checkpoint as its header and config.json say, without its data, changed; with a tokenizer.

    Args:
        folder: to make.
        source: folder of the checkpoint, which has one file.
        tensors: to add or replace; None leaves one out.
        config: keys merged into config.json.
        quantization: keys merged into `quantization_config`; the value REMOVE deletes one.
    """
    folder.mkdir()
    specs = {**read_header(source / "model.safetensors"), **(tensors or {})}
    write_safetensors(folder / "model.safetensors", {name: spec for name, spec in specs.items() if spec})
    made = {**json.loads((source / "config.json").read_text()), **(config or {})}
    if settings := {**(made.get("quantization_config") or {}), **quantization}:
        made["quantization_config"] = {key: value for key, value in settings.items() if value is not REMOVE}
    (folder / "config.json").write_text(json.dumps(made))
    write_tokenizer(folder, made["vocab_size"])
    return folder


def linear_shapes(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int
) -> dict[str, tuple[int, int]]:
    """Module name -> (N, K) of the seven projections of every block."""
    block = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in block.items()}


def quantized_linear(
    name: str, n: int, k: int, method: str, *, bits: int, group_size: int, dtype: str, sparse: float, full_rows: int
) -> dict[str, Spec]:
    """Tensors of one linear in the file layout of `method` (fp16, awq, squeezellm)."""
    if method == "fp16":
        return {f"{name}.weight": (dtype, (n, k))}
    if method == "awq":
        groups = 1 if group_size == -1 else -(-k // group_size)
        return {
            f"{name}.qweight": ("I32", (k, n * bits // 32)),
            f"{name}.qzeros": ("I32", (groups, n * bits // 32)),
            f"{name}.scales": ("F16", (groups, n)),
        }
    if method != "squeezellm":
        raise ValueError(f"unknown method {method!r}: fp16, awq, squeezellm")
    out: dict[str, Spec] = {
        f"{name}.lookup_table": ("F32", (n, 2**bits)),
        f"{name}.qweight": ("I32", (k * bits // 32, n)),
    }
    if sparse:
        count = max(1, int(n * k * sparse))
        out |= {f"{name}.rows": ("I32", (n + 1,)), f"{name}.cols": ("I32", (count,)), f"{name}.vals": ("F32", (count,))}
    if full_rows:
        out[f"{name}.full_rows"] = ("F32", (k, full_rows))
        out[f"{name}.full_row_indices"] = ("I32", (full_rows,))
    return out


def llama_tensors(
    method: str = "fp16",
    *,
    layers: int = 2,
    hidden: int = 256,
    intermediate: int = 512,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 512,
    bits: int = 4,
    group_size: int = 128,
    dtype: str = "F16",
    tie_word_embeddings: bool = False,
    bias: Iterable[str] = (),
    sparse: float = 0.0,
    full_rows: int = 0,
) -> dict[str, Spec]:
    """All tensors of a Llama checkpoint. `bias`: projections that have one ("q_proj", ...); `sparse`: CSR density."""
    with_bias = set(bias)
    out: dict[str, Spec] = {"model.embed_tokens.weight": (dtype, (vocab, hidden))}
    shapes = linear_shapes(layers, hidden, intermediate, heads, kv_heads, head_dim or hidden // heads)
    for name, (n, k) in shapes.items():
        if name.endswith(".q_proj"):
            out[name.removesuffix("self_attn.q_proj") + "input_layernorm.weight"] = (dtype, (hidden,))
        if name.endswith(".gate_proj"):
            out[name.removesuffix("mlp.gate_proj") + "post_attention_layernorm.weight"] = (dtype, (hidden,))
        out |= quantized_linear(
            name, n, k, method, bits=bits, group_size=group_size, dtype=dtype, sparse=sparse, full_rows=full_rows
        )
        if name.rpartition(".")[2] in with_bias:
            out[f"{name}.bias"] = (dtype, (n,))
    out["model.norm.weight"] = (dtype, (hidden,))
    if not tie_word_embeddings:
        out["lm_head.weight"] = (dtype, (vocab, hidden))
    return out


def quantization_config(method: str, bits: int = 4, group_size: int = 128) -> dict[str, Any] | None:
    """The usual `quantization_config` of config.json, None for fp16."""
    if method == "awq":
        return {"quant_method": "awq", "bits": bits, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return {"quant_method": "squeezellm", "wbits": bits} if method == "squeezellm" else None


def write_tokenizer(
    path: Path, vocab: int, *, chat_template: bool = True, added: Mapping[str, int] | None = None
) -> None:
    """A valid byte-level BPE tokenizer of `vocab` tokens without merges; `added`: further tokens with their ids."""
    names = ["<unk>", "<s>", "</s>"] + [f"t{i}" for i in range(max(0, vocab - 3))]
    special = {name: index for index, name in enumerate(names[:3])} | dict(added or {})
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": name, **flags} for name, index in special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": False, "byte_fallback": False,
            "vocab": {name: index for index, name in enumerate(names[:vocab])}, "merges": [],
        },
    }  # fmt: skip
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>",
    }  # fmt: skip
    if chat_template:
        config["chat_template"] = CHAT_TEMPLATE
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def write_weights(path: Path, tensors: Mapping[str, Spec], shards: int = 1) -> list[str]:
    """Write model.safetensors, or `shards` numbered files of about equal size and their index; returns file names."""
    if shards == 1:
        write_safetensors(path / "model.safetensors", tensors)
        return ["model.safetensors"]
    total = sum(map(nbytes, tensors.values()))
    parts: list[dict[str, Spec]] = [{} for _ in range(shards)]
    done = 0
    for name, spec in tensors.items():
        parts[min(shards - 1, done * shards // max(1, total))][name] = spec
        done += nbytes(spec)
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map: dict[str, str] = {}
    for file, part in zip(names, parts, strict=True):
        write_safetensors(path / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return names


def make_llama(
    path: Path,
    method: str = "fp16",
    *,
    layers: int = 2,
    hidden: int = 256,
    intermediate: int = 512,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 512,
    bits: int = 4,
    group_size: int = 128,
    dtype: str = "F16",
    tie_word_embeddings: bool = False,
    bias: Iterable[str] = (),
    sparse: float = 0.0,
    full_rows: int = 0,
    shards: int = 1,
    drop: Iterable[str] = (),
    extra: Mapping[str, Spec] | None = None,
    override: Mapping[str, Spec] | None = None,
    config: Mapping[str, Any] | None = None,
    quant_files: Mapping[str, Any] | None = None,
    tokenizer: bool = True,
    tokenizer_vocab: int | None = None,
    added_tokens: Mapping[str, int] | None = None,
    chat_template: bool = True,
) -> Path:
    """Write a whole checkpoint folder (made if missing) and return it.

    Args:
        method: fp16, awq or squeezellm; decides tensors and `quantization_config`.
        dtype: of unquantized tensors, F16, BF16 or F32; config.json `torch_dtype` follows it.
        drop: tensor names to leave out.  extra, override: name -> (dtype, shape) to add or replace.
        config: keys merged into config.json last; the value REMOVE deletes a key
            (`config={"quantization_config": REMOVE}`).
        quant_files: further JSON files, e.g. `{"quant_config.json": {"wbits": 4}}`.
        tokenizer_vocab: tokens in tokenizer.json, default `vocab`.
    """
    path.mkdir(parents=True, exist_ok=True)
    tensors = llama_tensors(
        method, layers=layers, hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, vocab=vocab, bits=bits, group_size=group_size, dtype=dtype,
        tie_word_embeddings=tie_word_embeddings, bias=bias, sparse=sparse, full_rows=full_rows,
    )  # fmt: skip
    for name in drop:
        del tensors[name]
    tensors |= dict(extra or {})
    for name in override or {}:
        if name not in tensors:
            raise KeyError(f"override of {name!r}, which this checkpoint does not have")
    tensors |= dict(override or {})
    write_weights(path, tensors, shards)

    data: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": tie_word_embeddings, "bos_token_id": 1, "eos_token_id": 2,
        "attention_bias": bool(set(bias)), "mlp_bias": False,
        "torch_dtype": {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[dtype],
    }  # fmt: skip
    if head_dim is not None:
        data["head_dim"] = head_dim
    quantization = quantization_config(method, bits, group_size)
    if quantization is not None:
        data["quantization_config"] = quantization
    data |= dict(config or {})
    (path / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not REMOVE}, indent=2) + "\n")
    for name, value in (quant_files or {}).items():
        (path / name).write_text(json.dumps(value))
    if tokenizer:
        write_tokenizer(
            path, vocab if tokenizer_vocab is None else tokenizer_vocab, chat_template=chat_template, added=added_tokens
        )
    return path
