"""GGUF on vLLM. Only vLLM's own processes import this module.

Blocks go to the kernels' codes as they are; only the embedding becomes floating point.
"""

from __future__ import annotations

import functools
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from vllm import envs
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from quantserve.api import K, N, Part, Scheme
from quantserve_gguf._decode import dequantized, mixed, pack_mixed, packed
from quantserve_gguf._folder import folder_of
from quantserve_gguf.blocks import BY_NAME, MIXED, served_types
from quantserve_gguf.families import FAMILIES, NOT_WEIGHTS, Family, renamed
from quantserve_gguf.header import Header, Info, read_header
from quantserve_kernels import PackedWeight
from quantserve_kernels.vllm import CSR, Format, Tensors, register

ROWS = 4096  # of the embedding that become floating point at once
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

SCHEMES = {
    name: Scheme({name: Part((N(), K(kind.elements), kind.nbytes), ("U8",))}, bits=kind.bits, group_size=kind.elements)
    for name, kind in BY_NAME.items()
    if kind.quantized
} | {
    MIXED.name: Scheme(
        {
            "codes": Part((N(), K()), ("U8",)),
            "scales": Part((N(), K(MIXED.group)), ("F32",)),
            "zeros": Part((N(), K(MIXED.group)), ("F32",)),
        },
        bits=MIXED.bits,
        group_size=MIXED.group,
    )
}
"""The parameters of a linear, by type: its blocks, uint8 [n, k / elements, bytes of a block]."""


class Gguf(Format):
    """Linears in the types of the file; the config says which."""

    name = "gguf"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Gguf:
        """Read the types of the linears, by module."""
        return cls(modules=served_types(config["types"]))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """The config names all quantized tensors; there are no safetensors."""
        self._stored = {
            f"{module}.{suffix}": "U8" for module, kind in self.modules.items() for suffix in SCHEMES[kind].parts
        }

    def scheme(self, module: str) -> Scheme | None:
        """That of the module's type."""
        kind = self.modules.get(module)
        return SCHEMES[kind] if kind else None

    def pack(self, tensors: Tensors, sparse: CSR | None) -> PackedWeight:
        """Unpack the blocks of the one type there is."""
        if "codes" in tensors:
            return pack_mixed(tensors["codes"], tensors["scales"], tensors["zeros"])
        ((name, blocks),) = tensors.items()
        return packed(name, blocks)


class GgufLoader(DefaultModelLoader):
    """Loads the weights of a folder that `folder_of` made."""

    def download_model(self, model_config: ModelConfig) -> None:
        """The files are here."""

    def get_all_weights(self, model_config: ModelConfig, model: Module) -> Iterator[tuple[str, Tensor]]:
        """The tensors of all files, named as the engine's model expects them."""
        config = model_config.hf_config
        types = served_types(config.quantization_config["types"])
        for file in sorted(Path(model_config.model).glob("*.gguf")):
            with file.open("rb") as opened:
                header = read_header(opened)
                data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            yield from _weights(header, data, config, types, model_config.dtype)


def _weights(
    header: Header, data: mmap.mmap, config: Any, types: Mapping[str, str], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
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


def install() -> None:
    """Register the format and the loader, and let an engine's ``model`` be a .gguf file."""
    register(Gguf)
    if _LOAD_FORMAT_TO_MODEL_LOADER.get(Gguf.name) is not GgufLoader:
        register_model_loader(Gguf.name)(GgufLoader)
    if not hasattr(EngineArgs.create_engine_config, "__wrapped__"):
        EngineArgs.create_engine_config = _opening(EngineArgs.create_engine_config)


def _opening(create: Any) -> Any:
    """`EngineArgs.create_engine_config` for which the file becomes a folder first; vLLM has no door for this."""

    @functools.wraps(create)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        if self.load_format == Gguf.name:
            folder = folder_of(self.model, self.revision, Path(envs.VLLM_CACHE_ROOT) / "gguf")
            if folder is not None:
                self.served_model_name = self.served_model_name or self.model
                self.model, self.revision = str(folder), None
        return create(self, *args, **kwargs)

    return create_engine_config
