"""The dtype vLLM 0.32 runs a model in: its whole decision in one place, for the core's checks and for plugins.

Written after ``_get_and_verify_dtype`` of ``vllm.config.model`` and ``supported_dtypes`` of ``vllm.platforms``; a test
holds both functions and `NO_FLOAT16` against the installed vLLM. Nothing of vLLM or torch is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantserve.families import service
from quantserve.target import Target

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint
    from quantserve.config import ModelConfig

DTYPE_BYTES: Mapping[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4}
# vLLM does not start a model of these types (``model_type`` of config.json, not of its text_config) in float16.
NO_FLOAT16 = frozenset({"gemma2", "gemma3", "gemma3_text", "glm4"})
_LONG = {"half": "float16", "float": "float32"}
# Further names of dtypes that torch knows: transformers loads a config that names one, and vLLM then falls back.
_OTHER = re.compile(
    r"float64|double|float(4|8)_e\w+|u?int[1-8]|u?int(16|32|64)|int|long|short|bool"
    r"|complex(32|64|128)|c(half|float|double)|qu?int\w+|bit|bits\w+"
)
_SAFETENSORS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
# vLLM takes the first dtype it finds: of the model, of its language model, then of an encoder.
_SECTIONS = ("", "text_encoder", "decoder", "generator", "text_config", "vision_config", "encoder_config")
_POOLING = ("embed", "classify")


@dataclass(frozen=True, slots=True)
class ServedDtype:
    """The activation dtype of a model.

    Attributes:
        name: ``float16``, ``bfloat16`` or ``float32``; a name vLLM does not know stays as it was written.
        source: what decided: ``engine_kwargs.dtype``, ``config.json`` or ``vLLM``.
        stored: dtype config.json or the files give, None when neither does.
        refused: vLLM does not start this model type in this dtype.
    """

    name: str
    source: str
    stored: str | None
    refused: bool = False


def served_dtype(checkpoint: Checkpoint, model: ModelConfig, target: Target) -> ServedDtype:
    """The dtype vLLM runs this model in on this target.

    ``auto`` keeps the stored dtype where the device and the model type have it. float32, and everything else, becomes
    the platform's first dtype: bfloat16; float16 for embedders and classifiers, and on GPUs before compute capability
    8.0, which have no bfloat16; float32 where neither is left (Gemma 2 on a T4).
    """
    stored = stored_dtype(checkpoint)
    asked = model.dtype
    if asked is not None:
        name = _LONG.get(asked, asked)
        return ServedDtype(name, "engine_kwargs.dtype", stored, name == "float16" and refuses_float16(checkpoint))
    possible = possible_dtypes(checkpoint, target)
    if stored != "float32" and stored in possible:
        return ServedDtype(stored, "config.json", stored)
    pooling = "float16" in possible and _is_pooling(checkpoint, model)
    return ServedDtype("float16" if pooling else possible[0], "vLLM", stored)


def method_dtype(checkpoint: Checkpoint, model: ModelConfig, target: Target, dtypes: Sequence[str]) -> str | None:
    """The ``dtype`` argument that a method which computes in ``dtypes`` has to give vLLM; None for none.

    None where vLLM's own decision is one of ``dtypes``, where the user decided (``auto`` included), and where no dtype
    of the method runs this model type on this target, which the core's checks then report. A CPU that multiplies
    bfloat16 in hardware and emulates float16 gets bfloat16.

    Args:
        dtypes: of ``float16``, ``bfloat16``, ``float32``.
    """
    if model.engine_kwargs.get("dtype") is not None:
        return None
    own = served_dtype(checkpoint, model, target).name
    possible = [name for name in possible_dtypes(checkpoint, target) if name in dtypes]
    if own == "float16" and target.prefers_bfloat16 and "bfloat16" in possible:
        return "bfloat16"
    return None if own in dtypes or not possible else possible[0]


def dtype_argument(
    checkpoint: Checkpoint, model: ModelConfig, target: Target, dtypes: Sequence[str]
) -> dict[str, object]:
    """`method_dtype` as ``quantserve_engine_kwargs`` returns it: ``{"dtype": ...}``, or nothing."""
    name = method_dtype(checkpoint, model, target, dtypes)
    return {"dtype": name} if name else {}


def stored_dtype(checkpoint: Checkpoint) -> str | None:
    """The dtype vLLM finds in config.json, else in the safetensors headers; None when neither has one."""
    for _, name in _written(checkpoint):
        return _LONG.get(name, name)
    present = {tensor.dtype for tensor in checkpoint.tensors.values() if tensor.file.endswith(".safetensors")}
    # The one that all others can be cast to without loss.
    return next((_SAFETENSORS[code] for code in ("F64", "F32", "BF16", "F16") if code in present), None)


def misspelt_dtype(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """Path and value of a dtype in config.json that torch does not have, which transformers fails on."""
    for path, name in _written(checkpoint):
        if name not in DTYPE_BYTES and name not in _LONG and not _OTHER.fullmatch(name):
            return path, name
    return None


def _written(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """The dtypes in config.json with their paths, in vLLM's order; ``dtype`` wins over ``torch_dtype``."""
    for section in _SECTIONS:
        config: Any = checkpoint.config.get(section) if section else checkpoint.config
        if not isinstance(config, Mapping):
            continue
        key = next((key for key in ("dtype", "torch_dtype") if config.get(key) is not None), None)
        if key is not None:
            value = config[key]
            yield (f"{section}.{key}" if section else key), value if isinstance(value, str) else "int64"


def possible_dtypes(checkpoint: Checkpoint, target: Target) -> tuple[str, ...]:
    """The dtypes of the platform in vLLM's order of preference, without those it refuses for the model type."""
    if target.device == "cuda" and target.capability is not None and target.capability < 80:
        names: tuple[str, ...] = ("float16", "float32") if target.capability >= 60 else ("float32",)
    else:
        names = ("bfloat16", "float16", "float32")
    return tuple(name for name in names if name != "float16" or not refuses_float16(checkpoint))


def refuses_float16(checkpoint: Checkpoint) -> bool:
    """Whether vLLM does not run a model of this type in float16, so that a quantizer keeps bfloat16."""
    return str(checkpoint.config.get("model_type")) in NO_FLOAT16


def _is_pooling(checkpoint: Checkpoint, model: ModelConfig) -> bool:
    """Whether vLLM runs the model as an embedder or classifier: asked for, or by modules.json, or by its class."""
    runner, convert = model.engine_kwargs.get("runner", "auto"), model.engine_kwargs.get("convert", "auto")
    if runner != "auto":
        return bool(runner == "pooling")
    if convert not in ("auto", "none"):
        return True
    names = checkpoint.config.get("architectures")
    classes = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return "modules.json" in checkpoint.files or service(classes)[1] in _POOLING
