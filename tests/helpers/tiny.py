"""A container that nobody has, and the plugin of a third party that reads it.

A ``.tiny`` file is ``TINY``, the length of a JSON header (u32, little-endian), the header and the data. A weight is
stored in blocks of 32 values and 18 bytes, as dtype ``B4``.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from helpers.checkpoints import llama_tensors, nbytes

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 512,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "torch_dtype": "float16", "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "tiny"},
}  # fmt: skip

PLUGIN = """
import json
import struct
from math import prod

from quantserve.api import BadContainer, Contents, Finding, Method, Reader, Tensor, hookimpl

@hookimpl
def quantserve_method():
    return Method(name="tiny", summary="weights in .tiny files", bits=(4,), vllm_name=None)

@hookimpl
def quantserve_reader():
    return Reader((".tiny",), read)

@hookimpl
def quantserve_detect(checkpoint):
    return (checkpoint.quantization_config or {}).get("quant_method") == "tiny"

@hookimpl
def quantserve_engine_kwargs(checkpoint):
    return {"load_format": "tiny"} if checkpoint.container else {}

def read(source, names):
    source.prefetch((name, 4096) for name in names)
    headers = {name: header(source, name) for name in names}
    first = headers[names[0]]
    return Contents(
        config=first["config"],
        tensors=[tensor for name, made in headers.items() for tensor in tensors(made, name)],
        tokenizer=first["tokenizer"],
        metadata={"author": first["author"]},
        problems=() if first["author"] else (Finding.warning("tiny-no-author", f"{names[0]} names no author"),),
    )

def header(source, name):
    with source.open(name) as file:
        start = file.read(8)
        if len(start) < 8 or start[:4] != b"TINY":
            raise BadContainer(f"it begins with {start[:4]!r}, not TINY and a length")
        (length,) = struct.unpack("<I", start[4:])
        text = file.read(length)
    if len(text) < length:
        raise BadContainer(f"its header has {len(text):,} of {length:,} bytes")
    try:
        made = json.loads(text)
        if not isinstance(made["config"], dict) or not isinstance(made["tensors"], dict):
            raise ValueError("config and tensors are no objects")
        if not isinstance(made["author"], str):
            raise ValueError("the author is no text")
        present, last = made["tokenizer"]["present"], made["tokenizer"]["max_token_id"]
        if not isinstance(present, bool) or type(last) is not int:
            raise ValueError("the tokenizer is unclear")
        made["tokenizer"] = {"present": present, "max_token_id": last, "has_chat_template": True}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadContainer(f"its header is not valid: {error}") from None
    return made

def tensors(made, file):
    for name, entry in made["tensors"].items():
        try:
            dtype, shape = entry
            good = dtype in ("B4", "F16") and all(type(size) is int for size in shape)
        except (ValueError, TypeError):
            good = False
        if not good:
            raise BadContainer(f"the entry of {name[:80]} is no dtype and shape")
        yield Tensor(name, dtype, tuple(shape), file, prod(shape) // 32 * 18 if dtype == "B4" else None)
"""


def header(part: int = 0, parts: int = 1, **changes: Any) -> dict[str, Any]:
    """The header of a small Llama, or of one of its parts."""
    tensors = {name: ("B4" if "proj" in name else "F16", list(shape)) for name, (_, shape) in llama_tensors().items()}
    chosen = dict(list(tensors.items())[part::parts])
    tokenizer = {"present": True, "max_token_id": 511}
    return {"config": CONFIG, "tensors": chosen, "tokenizer": tokenizer, "author": "somebody", **changes}


def packed(value: object) -> bytes:
    """The start of a file with this header."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return b"TINY" + struct.pack("<I", len(text)) + text


def write_tiny(path: Path, part: int = 0, parts: int = 1, **changes: Any) -> Path:
    """Write a whole file; its data are a hole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = header(part, parts, **changes)
    specs = llama_tensors()
    size = sum(
        nbytes(specs[name]) * 9 // 32 if spec[0] == "B4" else nbytes(specs[name])
        for name, spec in made["tensors"].items()
    )
    with path.open("wb") as file:
        file.write(packed(made))
        file.truncate(file.tell() + size)
    return path
