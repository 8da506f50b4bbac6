"""compressed-tensors on vLLM where vLLM's own method does not reach, weights only. Only vLLM's processes import it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsKVCacheMethod
from vllm.model_executor.models.utils import WeightsMapper

from quantserve_compressed_tensors.config import ENGINE, NAME, Config, read_config
from quantserve_compressed_tensors.schemes import Layout, layout_of
from quantserve_kernels import BITS, from_fp4, from_fp8, input_order, pack, unpack_stream
from quantserve_kernels.vllm import CSR, Format, Packed, Tensors
from quantserve_kernels.vllm.scheme import Scheme

STRIP = 256
"""Rows whose codes are taken apart at once: bounds the extra memory."""


class CompressedTensors(Format):
    """All that compressed-tensors stores, with 16-bit activations. The KV cache is vLLM's."""

    name = ENGINE
    ignored = (
        ".weight_shape", ".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale",
        ".output_zero_point",
    )  # fmt: skip
    config: Config
    kv_cache_scheme: dict[str, Any] | None
    total_num_heads: int | None
    total_num_kv_heads: int | None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CompressedTensors:
        """Read the quantization config; ValueError where it is wrong."""
        made = cls()
        made.config = read_config(config)
        if made.config.problems:
            raise ValueError(f"{NAME}: {made.config.problems[0]}. Fix: `quantserve check` explains it")
        for key in ("kv_cache_scheme", "total_num_heads", "total_num_kv_heads"):  # of CompressedTensorsKVCacheMethod
            setattr(made, key, config.get(key))
        return made

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take files that declare compressed-tensors where the engine's argument asks for this format."""
        declared = str(hf_quant_cfg.get("quant_method", "")).lower().replace("_", "-")
        return cls.name if user_quant == cls.name and declared == NAME else None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename paths of modules as the engine's model renames them; classes and patterns stay."""
        super().apply_vllm_mapper(hf_to_vllm_mapper)

        def renamed(names: Iterable[str]) -> list[str]:
            paths = {name for name in names if "." in name and not name.startswith("re:")}
            return [
                new for name in names for new in (hf_to_vllm_mapper.apply_list([name]) if name in paths else [name])
            ]

        groups = tuple(replace(group, targets=tuple(renamed(group.targets))) for group in self.config.groups)
        ignore = renamed(self.config.values.get("ignore") or ())
        self.config = replace(self.config, groups=groups, values={**self.config.values, "ignore": ignore})

    def get_quant_method(self, layer: Module, prefix: str) -> QuantizeMethodBase | None:
        """Of attention vLLM's own, which reads the scales of the KV cache."""
        if isinstance(layer, Attention):
            return CompressedTensorsKVCacheMethod(self)
        return super().get_quant_method(layer, prefix)

    def scheme(self, module: str) -> Scheme | None:
        """That of its group; None where the list ``ignore`` names it or no target matches."""
        parent, _, leaf = module.rpartition(".")
        fused = next((name for name, parts in self.packed_modules_mapping.items() if leaf in parts), "")
        layer = f"{parent}.{fused}" if fused else ""
        group = None if self.config.ignores(module, layer) else self.config.of(module, layer)
        layout = layout_of(group, engine=True) if group else None
        if group and layout is None:
            raise ValueError(f"{module}: config_groups.{group.name} is not served: weights {group.weights}")
        return layout

    def arrange(self, suffix: str, tensor: Tensor, scheme: Scheme, shape: tuple[int, int]) -> Tensor:
        """Scales of blocks for every row; zero points, and codes that leave bits of a word unused, one a byte."""
        assert isinstance(scheme, Layout)
        args, (n, k) = scheme.args, shape
        if suffix == "weight_scale" and args.block:
            return tensor.repeat_interleave(args.block[0], 0)[:n]
        if suffix == "weight_zero_point":
            return _octets(tensor.t(), args.bits, n).t()
        if suffix == "weight_packed" and args.type == "int" and 32 % args.bits:
            return _octets(tensor, args.bits, k)
        return tensor

    def pack_as(self, scheme: Scheme, tensors: Tensors, sparse: CSR | None) -> Packed:
        """(code - zero) * scale, or value * scale; with act-order the order of the inputs as well."""
        assert isinstance(scheme, Layout)
        args, scale = scheme.args, tensors["weight_scale"]
        if scale.dtype == torch.uint8:
            scale = scale.view(torch.float8_e8m0fnu).float()
        if (whole := tensors.get("weight_global_scale")) is not None:
            scale = scale.float() / whole
        columns = args.block[1] if args.block else args.group_size
        if args.type == "float":
            if args.bits == 4:
                return from_fp4(tensors["weight_packed"], scale)
            return from_fp8(tensors["weight"], scale, (1, columns) if columns else None)
        codes, zeros = (
            tensors["weight_packed" if "weight_packed" in tensors else "weight"],
            tensors.get("weight_zero_point"),
        )
        n, k = codes.shape[0], codes.shape[1] * (32 // args.bits if codes.dtype == torch.int32 else 1)
        g_idx, middle, bits = tensors.get("weight_g_idx"), 2 ** (args.bits - 1), min(b for b in BITS if b >= args.bits)
        order = None if g_idx is None else input_order(g_idx, columns or k)

        def channels(first: int, last: int) -> Tensor:
            part = codes[first:last]
            if part.dtype == torch.int32:
                part = unpack_stream(part.t(), args.bits)
            elif part.dtype == torch.int8:
                part = (part.to(torch.int16) + middle).to(torch.uint8)
            return part if order is None else part[:, order]

        table = torch.arange(2**bits, dtype=torch.float32, device=codes.device)[None]
        weight = pack(
            channels,
            table if zeros is not None else table - middle,
            bits=bits,
            shape=(n, k),
            scales=scale.reshape(n, -1),
            zeros=None if zeros is None else zeros.to(scale.dtype),
            group_size=columns or -1,
        )
        return weight, order


def _octets(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes uint8 [rows, count] of int32 words: a stream of bits, or whole codes in each word (`PADDED`).

    Raises:
        ValueError: the rows are longer or shorter.
    """
    per, index, rows = 32 // bits, torch.arange(count, device=words.device), []
    stream, padded = -(-count * bits // 32), -(-count // per)
    if words.dtype != torch.int32 or words.shape[1] not in (stream, padded):
        raise ValueError(f"{bits} bits have {words.shape[1]} words a row, expected {stream} or {padded}")
    first = index * bits if words.shape[1] == stream else index // per * 32 + index % per * bits
    word, shift = first // 32, first % 32
    for strip in words.split(STRIP):
        long = torch.nn.functional.pad(strip.long() & 0xFFFFFFFF, (0, 1))
        rows.append(((long[:, word] | long[:, word + 1] << 32) >> shift & 2**bits - 1).to(torch.uint8))
    return torch.cat(rows)
