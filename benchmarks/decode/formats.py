"""Checkpoints of further formats: rounded by a plugin's quantizer where that takes no calibration, else random.

Random codes and scales decode in the same time as others. The tensors are those of the plugin's `quantserve_scheme`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.console import BenchError, say
from benchmarks.decode.shapes import Shape
from quantserve.api import Checkpoint, Linear, Scheme, linears
from quantserve.config import load_object
from quantserve.planning.compose import Composition, compose
from quantserve.plugins.registry import Registry
from quantserve.target import find_target
from quantserve_bitsandbytes.quantizer import Nf4, Nf4Options
from quantserve_fp8.quantizer import Fp8, Fp8Options
from quantserve_hqq.quantizer import Hqq, HqqOptions
from quantserve_quantize.draft import write_folder
from quantserve_quantize.quantizer import Quantizer
from quantserve_quantize.run import Asked, quantize
from quantserve_quantize.source import Weights

SEED = 20261130
SMALL = 0.01
"""Standard deviation of the weights, roughly."""
ENGINE = ("quantization", "load_format")


@dataclass(frozen=True)
class Stored:
    """A format as random tensors.

    Attributes:
        method: the plugin.
        config: `quantization_config`.
    """

    method: str
    config: Mapping[str, Any] = field(default_factory=dict)


def _packed(bits: int, kind: str, group: int, strategy: str = "group", form: str = "pack-quantized") -> dict[str, Any]:
    weights = {
        "num_bits": bits, "type": kind, "strategy": strategy, "group_size": group, "symmetric": True, "dynamic": False,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }


STORED = {
    "gptq-4": Stored("gptq", {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}),
    "gptq-8": Stored("gptq", {"quant_method": "gptq", "bits": 8, "group_size": 128, "sym": True, "desc_act": False}),
    "w4a16": Stored("compressed-tensors", _packed(4, "int", 128)),
    "mxfp4": Stored(
        "compressed-tensors",
        _packed(4, "float", 32, form="mxfp4-pack-quantized"),
    ),
    "nvfp4": Stored(
        "modelopt", {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]}
    ),
    "fp8-block": Stored(
        "fp8", {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
    ),
}
"""Kind of checkpoint -> what it holds."""


ROUNDED: dict[str, tuple[str, Quantizer]] = {
    "fp8": ("fp8", Fp8(Fp8Options())),
    "nf4": ("bitsandbytes", Nf4(Nf4Options())),
    "hqq": ("hqq", Hqq(HqqOptions())),
}
"""Kind of checkpoint -> the plugin, and its quantizer, which needs no calibration."""


def make_rounded(kind: str, shape: Shape, path: Path) -> None:
    """By the plugin's own quantizer."""
    method, quantizer = ROUNDED[kind]
    quantize(shape.checkpoint("bf16"), path, quantizer, method, Asked())


def make_stored(kind: str, shape: Shape, path: Path) -> None:
    """Random tensors for all linears; everything else from the bf16 checkpoint."""
    config = {**shape.config(), "quantization_config": dict(STORED[kind].config)}
    schemes = schemes_of(STORED[kind].method, config)
    source = Weights(shape.checkpoint("bf16"))
    generator = torch.Generator().manual_seed(SEED)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in source.names:
            linear, scheme = schemes.get(name.removesuffix(".weight"), (None, None))
            if linear is None or scheme is None:
                yield name, source.get(name)
            else:
                yield from random_tensors(linear, scheme, generator)

    write_folder(path, tensors(), {"config.json": json.dumps(config, indent=2)}, [])


def schemes_of(method: str, config: Mapping[str, Any]) -> dict[str, tuple[Linear, Scheme | None]]:
    """What a plugin says of every linear. Some look for quantized tensors first: they see one of each kind."""
    plugin = Registry.load().find_method(method).module
    every = list(linears(Checkpoint.from_tensors(config, {})))
    seen: dict[str, tuple[str, tuple[int, ...]]] = {}
    for one in every:
        n, k = one.n, one.k
        seen |= {
            f"{one.name}.qweight": ("I32", (k // 8, n)),
            f"{one.name}.weight": ("F8_E4M3", (n, k)) if method == "fp8" else ("U8", (n, k // 2)),
            f"{one.name}.weight_packed": ("I32", (n, k // 8)),
            f"{one.name}.weight_scale_inv": ("F32", (-(-n // 128), -(-k // 128))),
        }
    headers = Checkpoint.from_tensors(config, seen)
    return {one.name: (one, plugin.quantserve_scheme(headers, one)) for one in every}


DTYPES = {
    "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


def random_tensors(linear: Linear, scheme: Scheme, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """The required tensors of a linear: random codes, scales that keep the weights small."""
    for suffix in scheme.required():
        part = scheme.alternatives(suffix)[0]
        shape = tuple(size or 1 for size in part.sizes(linear.n, linear.k))
        dtype = DTYPES[part.dtypes[0]]
        if suffix == "weight_shape":
            tensor = torch.tensor([linear.n, linear.k], dtype=dtype)
        elif suffix == "g_idx":
            tensor = (torch.arange(linear.k) // scheme.group_size).to(dtype)
        elif dtype == torch.float8_e4m3fn and suffix == "weight":
            octets = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            tensor = torch.where(octets & 0x7F == 0x7F, 0, octets).to(torch.uint8).view(dtype)
        elif dtype == torch.uint8 and "scale" in suffix:
            tensor = torch.randint(118, 121, shape, dtype=torch.uint8, generator=generator)  # 2 to the power of x - 127
        elif dtype in (torch.uint8, torch.int32):
            top = torch.iinfo(dtype)
            tensor = torch.randint(top.min, top.max + 1, shape, generator=generator).to(dtype)
        else:
            scale = 1.0 if dtype == torch.float8_e4m3fn else SMALL / 4 if scheme.bits < 8 else SMALL / 100
            tensor = (scale * (0.5 + torch.rand(shape, generator=generator))).to(dtype)
        yield f"{linear.name}.{suffix}", tensor


def planned(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Engine arguments and variables that quantserve plans for a checkpoint on a CPU, as far as the format needs them.

    Raises:
        BenchError: `quantserve check` refuses it; its words.
    """
    model = {"engine_config": {"model_id": path.stem, "hf_model_id": str(path), "max_total_tokens": 1024}}
    app = load_object({"models": [model]}, "benchmark")
    composition: Composition = compose(app.models[0], Registry.load(), find_target("cpu"), predict=False)
    if errors := [one for one in composition.errors if one.code != "tokenizer-missing"]:
        raise BenchError("; ".join(f"{one.code}: {one.message}" for one in errors))
    arguments = {name: setting.value for name, setting in composition.engine_kwargs.items() if name in ENGINE}
    say(f"  {path.name}: {composition.kernel or 'no kernel of a plugin'} {arguments}")
    return arguments, composition.environment
