"""The quantization methods of vLLM 0.32 that no other plugin of this project names, as data.

Devices, capabilities and dtypes are those of vLLM's own classes (``get_min_capability``, ``get_supported_act_dtypes``,
``supported_quantization`` of its platforms) and of the kernels that it lists for each platform.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantserve.api import Checkpoint

if TYPE_CHECKING:
    from quantserve.api import ModelConfig

GPUS = ("cuda", "rocm")
EVERYWHERE = ("cuda", "rocm", "cpu")


@dataclass(frozen=True, slots=True)
class Served:
    """One method of vLLM.

    Attributes:
        title: what messages call it.
        declared: ``quant_method`` of files in its format; none where it quantizes 16-bit files while they load.
        capability: lowest CUDA compute capability times ten.
        devices: where vLLM serves it.
        amx: whether its only kernel for CPUs needs AMX.
        dtypes: activation dtypes.
        over: declared methods of others that it can be asked for.
        online: whether it quantizes 16-bit files while they load.
        experts: whether it quantizes experts of mixtures and nothing else.
        deprecated: whether vLLM refuses it unless ``allow_deprecated_quantization`` is set.
    """

    title: str
    declared: tuple[str, ...] = ()
    capability: int = 75
    devices: tuple[str, ...] = EVERYWHERE
    amx: bool = False
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    over: tuple[str, ...] = ()
    online: bool = False
    experts: bool = False
    deprecated: bool = False


METHODS: Mapping[str, Served] = {
    "quark": Served("Quark", ("quark",), 70),
    "torchao": Served("torchao", ("torchao",), dtypes=("float16", "bfloat16", "float32")),
    "inc": Served("AutoRound", ("auto-round", "inc", "intel/auto-round"), 60),
    "fbgemm_fp8": Served("FBGEMM FP8", ("fbgemm_fp8",), 80, GPUS, deprecated=True),
    "fp_quant": Served("FP-Quant", ("fp_quant",), 100, ("cuda",), dtypes=("bfloat16",), deprecated=True),
    "mxfp8": Served("MXFP8", ("mxfp8",), devices=GPUS, online=True),
    "experts_int8": Served("INT8 experts", ("experts_int8",), 80, ("cuda", "cpu"), True, online=True, experts=True),
    "fp8_per_tensor": Served("online FP8, a scale per tensor", devices=GPUS, online=True),
    "fp8_per_channel": Served("online FP8, a scale per output channel", online=True),
    "fp8_per_block": Served("online FP8, a scale per 128 x 128 block", amx=True, online=True),
    "int8_per_channel_weight_only": Served(
        "online INT8 experts", devices=("cuda", "cpu"), amx=True, online=True, experts=True
    ),
    "nvfp4_per_token": Served("online NVFP4 experts", (), 100, ("cuda",), online=True, experts=True),
    "online": Served("online quantization by quantization_config", online=True),
    "moe_wna16": Served("GPTQ and AWQ with vLLM's Triton kernel for experts", (), 70, ("cuda",), over=("gptq", "awq")),
    "humming": Served(
        "vLLM's Humming kernels", devices=("cuda",), over=("gptq", "awq", "fp8", "compressed-tensors", "modelopt")
    ),
}
"""vLLM's ``quantization`` argument -> what it is."""

ARGUMENTS: Mapping[str, str] = {
    name: argument for argument, served in METHODS.items() for name in (argument, *served.declared)
}
"""Every name of a config or a file -> vLLM's argument."""


def declared(checkpoint: Checkpoint) -> str:
    """The ``quant_method`` of the checkpoint, "" for none."""
    method = (checkpoint.quantization_config or {}).get("quant_method")
    return method if isinstance(method, str) else ""


def argument_of(checkpoint: Checkpoint, model: ModelConfig) -> str:
    """vLLM's argument that the user names, else that of the declared method; "" for neither."""
    return ARGUMENTS.get((model.quantization or "").lower()) or ARGUMENTS.get(declared(checkpoint), "")
