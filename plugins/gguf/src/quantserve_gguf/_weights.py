"""The tensors of a file in torch: blocks as they are stored, or floating point."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from quantserve_gguf._decode import dequantized, mixed
from quantserve_gguf.blocks import BY_NAME, MIXED
from quantserve_gguf.families import FAMILIES, NOT_WEIGHTS, Family, renamed
from quantserve_gguf.header import Info, read_header

ROWS = 4096
"""Of a weight that become floating point at once."""
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weights(file: BinaryIO, config: Any, types: Mapping[str, str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, named as in transformers.

    Args:
        file: open for reading.
        config: transformers' config.
        types: type of each linear that stays in blocks, by module; every other tensor becomes `dtype`.
        dtype: of floating-point tensors.
    """
    header = read_header(file)
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    family = _family(config.model_type)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for info in header.tensors:
        name = None if info.name in NOT_WEIGHTS else renamed(family, info.name)
        if name is None:
            continue
        tensor, kind = _stored(info, data)
        module, _, suffix = name.rpartition(".")
        if family.paired and (count := heads.get(module.rpartition(".")[2])):
            tensor = tensor.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)
        if suffix == "weight" and types.get(module) == MIXED.name:
            yield from ((f"{module}.{part}", value) for part, value in mixed(kind, tensor).items())
        elif suffix == "weight" and module in types:
            yield f"{module}.{kind}", tensor
        elif BY_NAME[kind].quantized:
            yield name, torch.cat([dequantized(kind, rows).to(dtype) for rows in tensor.split(ROWS)])
        else:
            yield name, (tensor - family.norm_offset if "norm." in name else tensor).to(dtype)


def _stored(info: Info, data: mmap.mmap) -> tuple[Tensor, str]:
    """A tensor as it lies in the file: blocks [n, k / elements, bytes of a block], or plain floats; and its type."""
    kind = info.blocks
    assert kind is not None  # checked when the folder was made
    assert info.nbytes is not None
    octets = torch.frombuffer(data, dtype=torch.uint8, count=info.nbytes, offset=info.start)
    if kind.name in _DTYPES:
        return octets.view(_DTYPES[kind.name]).view(info.shape), kind.name
    return octets.view(*info.shape[:-1], -1, kind.nbytes), kind.name


def _family(model_type: str) -> Family:
    return next(family for family in FAMILIES.values() if family.model_type == model_type)
