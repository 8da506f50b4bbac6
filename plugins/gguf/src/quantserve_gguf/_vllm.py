"""GGUF on vLLM. Only vLLM's own processes import this module.

Blocks go to the kernels' codes as they are; only the embedding becomes floating point.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Module
from vllm import envs
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from quantserve.api import K, N, Part, Scheme
from quantserve_gguf._decode import pack_mixed, packed
from quantserve_gguf._folder import folder_of
from quantserve_gguf._weights import weights
from quantserve_gguf.blocks import BY_NAME, MIXED, served_types
from quantserve_kernels import PackedWeight
from quantserve_kernels.vllm import CSR, Format, Tensors, register

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
                yield from weights(opened, config, types, model_config.dtype)


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
