"""From a .gguf file, or the parts of one, to what `quantserve check` judges."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Final

from quantserve.api import BadContainer, Contents, Finding, Source, Tensor
from quantserve_gguf.blocks import TYPES
from quantserve_gguf.families import FAMILIES, NOT_WEIGHTS, Unserved, config_of, renamed
from quantserve_gguf.header import Counted, Header, Info, Value, read_header

AGAIN: Final = "download the file again, or convert it again with llama.cpp's convert_hf_to_gguf.py"
ELSEWHERE: Final = "serve it with llama.cpp (`llama-server`) or with vllm-gguf-plugin"
FIRST_READ: Final = 1 << 20


def read(source: Source, names: tuple[str, ...]) -> Contents:
    """Read the headers of the files of one model; see `Reader.read`."""
    source.prefetch((name, FIRST_READ) for name in names)
    headers: dict[str, Header] = {}
    factors: tuple[float, ...] = ()
    for name in names:
        with source.open(name) as file:
            headers[name] = header = read_header(file)
            factors = factors or _factors(file, header)
    metadata = headers[names[0]].metadata
    problems = [*_split(metadata, names), *_positions(source, headers)]
    infos = [(name, info) for name, header in headers.items() for info in header.tensors]
    try:
        config = config_of(metadata, {info.name: info.shape for _, info in infos}, factors)
    except Unserved as error:
        problems.append(Finding.error("gguf-unserved", f"{names[0]} is not served: {error}", names[:1], ELSEWHERE))
        return Contents(tokenizer=_tokenizer(metadata), problems=tuple(problems))
    tensors = _tensors(str(metadata["general.architecture"]), infos, problems)
    config["quantization_config"] = {"quant_method": "gguf", "types": types_of(tensors)}
    config["torch_dtype"] = _dtype(tensors)
    title = metadata.get("general.name")
    return Contents(
        config=config,
        tensors=tensors,
        tokenizer=_tokenizer(metadata),
        metadata={"general.name": title} if isinstance(title, str) else {},
        problems=tuple(problems),
    )


def types_of(tensors: list[Tensor]) -> dict[str, str]:
    """The types of the quantized linears, by module."""
    quantized = {blocks.name for blocks in TYPES.values() if blocks.quantized}
    return {
        tensor.name.removesuffix(".weight"): tensor.dtype
        for tensor in tensors
        if tensor.dtype in quantized and tensor.name.endswith("weight") and "embed_tokens" not in tensor.name
    }


def _factors(file: BinaryIO, header: Header) -> tuple[float, ...]:
    """The factors of the rotary embedding, a few hundred floats: the only data that is read. None for none."""
    for info in header.tensors:
        if info.name == "rope_freqs.weight" and info.type == 0 and len(info.shape) == 1 and info.shape[0] <= 512:
            file.seek(info.start)
            data = file.read(info.shape[0] * 4)
            return struct.unpack(f"<{info.shape[0]}f", data) if len(data) == info.shape[0] * 4 else ()
    return ()


def _tensors(architecture: str, infos: list[tuple[str, Info]], problems: list[Finding]) -> list[Tensor]:
    """The tensors under the names of transformers. What cannot be served is added to the problems; of a file with such
    types none are returned, so that nothing is called missing.
    """
    family = FAMILIES[architecture]
    foreign: list[str] = []
    unserved: dict[str, list[str]] = {}
    broken: list[str] = []
    found: list[Tensor] = []
    for file, info in infos:
        if info.name in NOT_WEIGHTS:
            continue
        name = renamed(family, info.name)
        if name is None:
            foreign.append(info.name)
        elif info.blocks is None or not info.blocks.bits:
            unserved.setdefault(info.blocks.name if info.blocks else f"type {info.type}", []).append(info.name)
        elif info.nbytes is None:
            broken.append(f"{info.name} {list(info.shape)} {info.blocks.name}")
        else:
            found.append(Tensor(name, info.blocks.name, info.shape, file, info.nbytes))
    if foreign:
        message = f"{len(foreign):,} tensors are none of {architecture}, such as {foreign[0]}"
        problems.append(Finding.error("gguf-unknown-tensors", message, foreign[:20], ELSEWHERE))
    for kind, names in unserved.items():
        message = f"{len(names):,} tensors are stored as {kind}, which is not served here, such as {names[0]}"
        fix = f"take a file in Q4_K_M, Q4_0, IQ4_NL or Q8_0, or {ELSEWHERE}"
        problems.append(Finding.error("gguf-unserved-type", message, names[:20], fix))
    if broken:
        message = f"the rows of {len(broken):,} tensors are no whole number of blocks, such as {broken[0]}"
        problems.append(Finding.error("gguf-blocks", message, broken[:20], AGAIN))
    return [] if unserved or broken else found


def _positions(source: Source, headers: Mapping[str, Header]) -> Iterator[Finding]:
    """Tensors whose data lie beyond the end of their file, or in each other."""
    for name, header in headers.items():
        size, outside, last = source.files.get(name, -1), [], (0, "")
        for info in sorted(header.tensors, key=lambda one: one.start):
            end = info.start + (info.nbytes or 0)
            if info.start < last[0]:
                raise BadContainer(f"tensors {last[1]} and {info.name} overlap at byte {info.start:,}")
            last = (end, info.name)
            if 0 <= size < end:
                outside.append(f"{info.name}: bytes {info.start:,} to {end:,}")
        if outside:
            message = f"{name} is cut off: it has {size:,} bytes, and {len(outside):,} tensors end after that"
            yield Finding.error("gguf-truncated", message, outside[:20], AGAIN)


def _split(metadata: Mapping[str, Value], names: tuple[str, ...]) -> list[Finding]:
    """A file that is one part of several, without the others."""
    parts = metadata.get("split.count", 0)
    if type(parts) is not int or parts <= 1 or parts == len(names):
        return []
    message = f"{names[0]} is part of a model in {parts:,} files, and {len(names):,} of them are here"
    fix = "put all parts into one folder under their names, NAME-00001-of-0000N.gguf"
    return [Finding.error("gguf-split", message, names[:20], fix)]


def _tokenizer(metadata: Mapping[str, Value]) -> dict[str, Any]:
    """Facts of the tokenizer; none where the file has none, so that one beside it counts."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    count = tokens.length if isinstance(tokens, Counted) else 0
    if not count or "tokenizer.ggml.model" not in metadata:
        return {}
    template = isinstance(metadata.get("tokenizer.chat_template"), str)
    return {
        "present": True, "max_token_id": count - 1, "max_base_token_id": count - 1, "has_chat_template": template,
    }  # fmt: skip


def _dtype(tensors: list[Tensor]) -> str:
    """float16 where most of the weights are, else bfloat16: in quantized files nothing says what they were made of."""
    bytes_of: dict[str, int] = {}
    for tensor in tensors:
        bytes_of[tensor.dtype] = bytes_of.get(tensor.dtype, 0) + tensor.nbytes
    return "float16" if max(bytes_of, key=lambda one: bytes_of[one], default="") == "F16" else "bfloat16"
