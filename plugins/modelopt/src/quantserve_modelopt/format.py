"""ModelOpt checkpoints as data: both forms of their quantization config, and the tensors of a linear. Imports no torch.

What is read and refused follows vLLM 0.32's ``modelopt.py``; a test compares both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, cached_property
from typing import Any

from quantserve.api import K, N, Part, Scheme

NAMES = ("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed")
"""Values of ``quant_method``, and of vLLM's argument ``quantization`` on GPUs."""
FILE = "hf_quant_config.json"
FP8, CHANNEL, BLOCK, MXFP8, MIXED = "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", "MIXED_PRECISION"
NVFP4, W4A16 = "NVFP4", "W4A16_NVFP4"
ARGUMENTS = dict.fromkeys((FP8, CHANNEL, BLOCK), NAMES[0]) | dict.fromkeys((NVFP4, W4A16), NAMES[1])
ARGUMENTS |= {MXFP8: NAMES[2], MIXED: NAMES[3]}
"""The algorithms that vLLM serves -> its argument."""
SIDE, GROUP, MX_GROUP = 128, 16, 32
"""Rows and columns of a block of FP8_PB_WO, inputs of a group of NVFP4, and of MXFP8."""
_REQUIRED: dict[str, tuple[str, ...]] = {MXFP8: ("kv_cache_quant_algo", "exclude_modules")}
_REQUIRED |= dict.fromkeys((NVFP4, W4A16), ("group_size", "kv_cache_quant_algo", "exclude_modules"))


@dataclass(frozen=True)
class Settings:
    """A quantization config.

    Attributes:
        algorithm: ``quant_algo`` in upper case.
        group_size: inputs that share a scale in NVFP4.
        key: what the list of unquantized modules is called.
        excluded: its entries.
        layers: of MIXED_PRECISION, the algorithm by module.
        cache: of the KV cache, such as ``FP8``; "" where it keeps 16 bits.
    """

    algorithm: str
    group_size: int
    key: str
    excluded: tuple[str, ...]
    layers: Mapping[str, str]
    cache: str

    def of(self, module: str) -> str:
        """The algorithm of a module; "" where it is unquantized. vLLM gives all experts of a layer one."""
        if self.algorithm != MIXED:
            return self.algorithm
        block, inside, _ = module.partition(".experts.")
        if not inside:
            return self.layers.get(module, "")
        found = (self.layers.get(f"{block}.experts"), self.parents.get(f"{block}.experts"), self.parents.get(block))
        return next(filter(None, found), "")

    @cached_property
    def parents(self) -> Mapping[str, str]:
        """`layers` by every path above a module; of several modules the first counts, as in vLLM."""
        found: dict[str, str] = {}
        for module, algorithm in self.layers.items():
            parts = module.split(".")
            for length in range(1, len(parts)):
                found.setdefault(".".join(parts[:length]), algorithm)
        return found

    def algorithms(self) -> set[str]:
        """Those of all modules."""
        return set(self.layers.values()) if self.algorithm == MIXED else {self.algorithm}


def excludes(entries: Iterable[str], module: str) -> bool:
    """Whether an entry is a part of a module's name, or a wildcard that matches it."""
    return any(entry in module or fnmatchcase(module, entry) for entry in entries)


def body(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that has the keys: that under ``quantization`` in hf_quant_config.json."""
    inner = config.get("quantization", config)
    return inner if isinstance(inner, Mapping) else {}


def read(config: Mapping[str, Any]) -> Settings:
    """Read a quantization config as vLLM does.

    Raises:
        ValueError: vLLM stops at it, or a module has an algorithm that is not served; names the key.
    """
    inner, old = body(config), "quantization" in config
    algorithm = str(inner.get("quant_algo") or "").upper()
    if algorithm not in ARGUMENTS:
        raise ValueError(
            f"quant_algo is {inner.get('quant_algo', 'missing')!s:.40}; vLLM serves {', '.join(ARGUMENTS)}"
        )
    if old and (missing := [key for key in _REQUIRED.get(algorithm, ()) if key not in inner]):
        raise ValueError(f"{', '.join(missing)} missing, which vLLM requires for {algorithm} in {FILE}")
    key = "exclude_modules" if old else "ignore"
    excluded = inner.get(key, [])
    if not isinstance(excluded, list) or not all(isinstance(entry, str) for entry in excluded):
        raise ValueError(f"{key} is {str(excluded)[:60]}, expected a list of names and wildcards")
    entries = inner.get("quantized_layers", {})
    if algorithm == MIXED and (not isinstance(entries, Mapping) or not entries):
        raise ValueError(f"quantized_layers is empty, without which {MIXED} says nothing of any layer")
    layers, sizes = {}, [inner.get("group_size")]
    for module, entry in entries.items() if algorithm == MIXED else ():
        value = str(entry.get("quant_algo")).upper() if isinstance(entry, Mapping) else ""
        if value not in ARGUMENTS or value == MIXED:
            raise ValueError(f"quantized_layers.{module} is {str(entry)[:60]}, expected one of {', '.join(ARGUMENTS)}")
        layers[module] = value
        sizes += [entry.get("group_size")] if "NVFP4" in value else []
    size = next((one for one in sizes if one is not None), GROUP)
    if isinstance(size, bool) or not str(size).isdecimal() or int(size) < 1:
        raise ValueError(f"group_size is {size!r}, expected a positive integer")
    groups = inner.get("config_groups")
    if algorithm == NVFP4 and isinstance(groups, Mapping) and groups:
        quantized = [not isinstance(one, Mapping) or one.get("input_activations") for one in groups.values()]
        algorithm = NVFP4 if any(one is not None for one in quantized) else W4A16
    return Settings(algorithm, int(size), key, tuple(excluded), layers, _cache(config, inner))


def _cache(config: Mapping[str, Any], inner: Mapping[str, Any]) -> str:
    keys = ("kv_cache_scheme", "kv_cache_quant_algo")
    value = next((found for key in keys for found in (inner.get(key), config.get(key)) if found), "")
    if isinstance(value, Mapping):
        bits = value.get("num_bits") if value.get("type") == "float" else 0
        return "FP8" if bits == 8 and value.get("dynamic") is False else "NVFP4" if bits == 4 else ""
    return value.upper() if isinstance(value, str) and value.lower() in ("fp8", "nvfp4") else ""


@cache
def scheme(algorithm: str, group_size: int = GROUP) -> Scheme:
    """The tensors of a linear; the weight is E4M3 [n, k], in NVFP4 two E2M1 values a byte, the first in the low half.

    Scales multiply: NVFP4 has one of each group in E4M3 and one of the tensor, MXFP8 powers of two, a byte e for
    2^(e - 127). ``input_scale`` belongs to 8- and 4-bit activations.
    """
    one: tuple[Part, ...] = (Part((), ("F32",)), Part((1,), ("F32",)))
    inputs = tuple(Part(part.shape, part.dtypes, optional=True) for part in one)
    fp8 = Part((N(), K()), ("F8_E4M3",))
    if algorithm in (NVFP4, W4A16):
        packed, scales = Part((N(), K(2)), ("U8",)), Part((N(), K(group_size)), ("F8_E4M3",))
        parts: dict[str, Part | tuple[Part, ...]] = {"weight": packed, "weight_scale": scales}
        parts |= {"weight_scale_2": one, "input_scale": inputs}
        bits = 4 if algorithm == NVFP4 else 16
        return Scheme(parts, bits=4, group_size=group_size, activation_bits=bits, kept=4 + 32 / group_size)
    if algorithm == MXFP8:
        scales = Part((N(), K(MX_GROUP)), ("U8",))
        return Scheme({"weight": fp8, "weight_scale": scales}, bits=8, group_size=MX_GROUP, activation_bits=8)
    if algorithm == BLOCK:
        scales = Part((N(SIDE, partial=True), 1, K(SIDE), 1), ("F32",))
        return Scheme(
            {"weight": fp8, "weight_scale": scales}, bits=8, group_size=SIDE, scales="block", activation_bits=8
        )
    of_channels = algorithm == CHANNEL
    scale = (Part((N(),), ("F32",)), Part((N(), 1), ("F32",))) if of_channels else one
    return Scheme(
        {"weight": fp8, "weight_scale": scale, "input_scale": inputs},
        bits=8,
        scales="channel" if of_channels else "tensor",
        activation_bits=8,
    )
