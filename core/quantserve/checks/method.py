"""Does the method fit the checkpoint's own declaration, the device and the dtype?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quantserve.finding import Finding
from quantserve.model.architecture import short
from quantserve.model.dtypes import DTYPE_BYTES, misspelt_dtype, possible_dtypes, served_dtype
from quantserve.model.layers import block_of

if TYPE_CHECKING:
    from quantserve.checkpoint import Checkpoint
    from quantserve.config import ModelConfig
    from quantserve.method import Method
    from quantserve.target import Target

_CONFIG_FILES = ("quantize_config.json", "quant_config.json")
_SPELLINGS = {"w_bit": "bits", "wbits": "bits", "q_group_size": "group_size"}
_COMPARED = ("quant_method", "bits", "group_size", "sym", "desc_act", "zero_point", "version", "checkpoint_format")
_PACKED_DTYPES = ("I32", "U32", "I16", "U16", "I8", "U8", "I64")


def declared_config(checkpoint: Checkpoint, model: ModelConfig) -> Mapping[str, Any] | None:
    """The quantization config vLLM will see: the user's ``hf_overrides`` first, then the checkpoint's."""
    overrides = model.engine_kwargs.get("hf_overrides")
    own = overrides.get("quantization_config") if isinstance(overrides, Mapping) else None
    return own if isinstance(own, Mapping) else checkpoint.quantization_config


def check_declared_method(
    checkpoint: Checkpoint, model: ModelConfig, target: Target, method: Method
) -> Iterator[Finding]:
    """Compare the method with ``quantization_config``, as vLLM does before it builds a model."""
    raw = checkpoint.config.get("quantization_config")
    if raw is not None and not isinstance(raw, Mapping):
        yield Finding.error(
            "quantization-config-invalid",
            f"quantization_config in config.json is {type(raw).__name__}, not an object",
            ["quantization_config"],
            "write it as an object with quant_method, or remove it",
        )
        return
    config = declared_config(checkpoint, model)
    if config is None:
        yield from _check_config_files(checkpoint, method)
        return
    yield from _check_files_agree(checkpoint, config)
    declared = config.get("quant_method")
    if not isinstance(declared, str) or not declared.strip():
        keys = ", ".join(short(key) for key in list(config)[:8]) or "none"
        yield Finding.error(
            "quant-method-missing",
            f"quantization_config has no quant_method (its keys: {keys}); "
            f"vLLM takes the model for unquantized and rejects the argument {method.vllm_name!r}",
            ["quantization_config.quant_method"],
            f'add "quant_method": "{method.vllm_name or method.name}" to quantization_config in config.json',
        )
        return
    declared = declared.strip().lower()
    said = "engine_kwargs.quantization is" if model.quantization else "the model is served by method"
    if declared not in (*method.names, method.vllm_name, *method.accepts):
        yield Finding.error(
            "method-mismatch",
            f"config.json declares quant_method {short(declared)}, but {said} {model.quantization or method.name!r}",
            ["quantization_config.quant_method", "engine_kwargs.quantization"],
            f"set engine_kwargs.quantization to {short(declared)} (its plugin has to be installed), or leave it out",
        )
        return
    # vLLM takes another argument than the declared name only where a config class of its own maps it.
    accepted = (declared, *method.accepts.get(declared, {}).get(target.device, ()))
    if method.vllm_name is not None and method.vllm_name.lower() not in accepted:
        yield Finding.error(
            "method-mismatch",
            f"config.json declares quant_method {short(declared)}; vLLM on {target.device} does not accept "
            f"the argument {method.vllm_name!r} of method {method.name!r} for it",
            ["quantization_config.quant_method"],
            f'if the files are yours, write "quant_method": "{method.vllm_name}" into quantization_config of '
            f"config.json; else the plugin's author lists {method.vllm_name!r} in Method.accepts[{declared!r:.80}]",
        )


def _check_config_files(checkpoint: Checkpoint, method: Method) -> Iterator[Finding]:
    """Without a dictionary in config.json vLLM looks for exactly one top-level file."""
    if method.vllm_name is None:
        return
    names = sorted(name for name in checkpoint.files if name.endswith(_CONFIG_FILES) and "/" not in name)
    packed = any(tensor.dtype in _PACKED_DTYPES and block_of(name) for name, tensor in checkpoint.tensors.items())
    if len(names) > 1:
        yield Finding.error(
            "quant-config-ambiguous",
            f"{len(names)} files could be the quantization config: {', '.join(names)}; vLLM refuses to choose",
            names,
            "keep one of them, or write quantization_config into config.json",
        )
    elif not names and packed:
        yield Finding.error(
            "quant-config-missing",
            f"the weights are quantized and served by method {method.name!r}, but neither config.json has a "
            f"quantization_config nor is there a file that ends in {' or '.join(_CONFIG_FILES)}",
            ["config.json"],
            f'add "quantization_config": {{"quant_method": "{method.vllm_name}", ...}} to config.json',
        )


def _check_files_agree(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Iterator[Finding]:
    """A file beside config.json with other settings: tools read either, and vLLM reads config.json."""
    own = _compared(config)
    for name, values in checkpoint.quant_files.items():
        other = _compared(values) if name.endswith(_CONFIG_FILES) else {}
        odd = [key for key in own if other.get(key, own[key]) != own[key]]
        if odd:
            said = "; ".join(f"{key} is {short(own[key])} and {short(other[key])}" for key in odd)
            yield Finding.warning(
                "quant-config-disagree",
                f"config.json and {name} disagree, and vLLM reads config.json: {said}",
                [f"{name}: {key}" for key in odd],
                f"correct the wrong one, or remove {name}",
            )


def _compared(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide how codes are read, under one spelling."""
    found = {_SPELLINGS.get(key, key): value for key, value in values.items()}
    texts = {key: value.lower() if isinstance(value, str) else value for key, value in found.items()}
    return {key: texts[key] for key in _COMPARED if isinstance(texts.get(key), (str, int))}


def check_device(target: Target, method: Method) -> Iterator[Finding]:
    """Compare the target with the devices and compute capability a method needs."""
    if target.device not in method.devices:
        yield Finding.error(
            "device-unsupported",
            f"method {method.name!r} runs on {', '.join(method.devices)}; the target {target.name} is {target.device}",
            [target.name],
            "choose another target, or a checkpoint of a method that runs on this one (`quantserve list`)",
        )
    elif target.capability is not None and target.capability < method.minimum_capability:
        need, have = method.minimum_capability, target.capability
        yield Finding.error(
            "capability-too-low",
            f"method {method.name!r} needs compute capability {need // 10}.{need % 10}; "
            f"{target.name} has {have // 10}.{have % 10}",
            [target.name],
            "use a newer GPU, or serve the unquantized model",
        )


def check_dtype(
    checkpoint: Checkpoint, model: ModelConfig, target: Target, method: Method | None, dtype_by: str = ""
) -> Iterator[Finding]:
    """Check the dtype vLLM will run the model in, which is not always the one config.json names.

    ``dtype_by`` names the plugin that set it, "" when the config did or nobody.
    """
    served = served_dtype(checkpoint, model, target)
    by_plugin = bool(dtype_by) and served.source == "engine_kwargs.dtype"
    decided = f"plugin {dtype_by!r}" if by_plugin else served.source
    old_gpu = target.device == "cuda" and target.capability is not None and target.capability < 80
    possible = possible_dtypes(checkpoint, target)
    if misspelt := misspelt_dtype(checkpoint):
        path, value = misspelt
        yield Finding.error(
            "config-dtype-unknown",
            f"{path} in config.json is {short(value)}; torch has no dtype of that name, so transformers cannot read "
            "the config",
            [path],
            f"write one of {', '.join(DTYPE_BYTES)} into config.json",
        )
    if served.name not in DTYPE_BYTES:
        yield Finding.error(
            "dtype-unknown",
            f"engine_kwargs.dtype {served.name!r} is not a dtype vLLM runs models in",
            ["engine_kwargs.dtype"],
            f"use one of auto, {', '.join(DTYPE_BYTES)}",
        )
        return
    if served.name == "bfloat16" and old_gpu and target.capability is not None:
        have = target.capability
        yield Finding.error(
            "bfloat16-unsupported",
            f"engine_kwargs.dtype is bfloat16, which needs compute capability 8.0; {target.name} has "
            f"{have // 10}.{have % 10}",
            ["engine_kwargs.dtype"],
            f"set engine_kwargs.dtype to {possible[0]}",
        )
    if served.refused:
        yield Finding.error(
            "dtype-refused-by-model",
            f"vLLM does not run model type {short(checkpoint.config.get('model_type'))} in float16, which overflows "
            f"there; float16 was set by {decided}",
            ["engine_kwargs.dtype"],
            f"leave engine_kwargs.dtype out, or set it to {possible[0]}",
        )
    if method is not None and served.name not in method.dtypes:
        fitting = [name for name in method.dtypes if name in possible]
        stored = served.stored or "no dtype"
        how = f" (config.json has {stored}, which auto turns into it)" if served.source == "vLLM" else ""
        yield Finding.error(
            "dtype-unsupported",
            f"method {method.name!r} runs in {' or '.join(method.dtypes)}; vLLM would run it in {served.name}, "
            f"decided by {decided}{how}",
            ["engine_kwargs.dtype"],
            f"set engine_kwargs.dtype to {fitting[0]}"
            if fitting
            else f"use another method: {target.name} runs this model in {' or '.join(possible)} only",
        )
    elif served.stored == "bfloat16" and served.name == "float16":
        yield Finding.warning(
            "dtype-narrowed",
            f"the weights are bfloat16 and will run in float16 (decided by {decided}); values above 65504 overflow",
            ["engine_kwargs.dtype"],
            "use a GPU with compute capability 8.0 or a float16 checkpoint, or compare its answers"
            if old_gpu
            else "compare its answers with those of the unquantized model"
            if by_plugin
            else "set engine_kwargs.dtype to auto",
        )
