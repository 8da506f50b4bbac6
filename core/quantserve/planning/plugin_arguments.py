"""Engine arguments that plugins set: checked like the user's own, and those that make vLLM run code are named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from pydantic import ValidationError

from quantserve.config.model import EngineConfig

CODE_ARGUMENTS: Final[Mapping[str, str]] = {
    "trust_remote_code": "Python code that comes with the checkpoint",
    "worker_cls": "the worker class it names",
    "worker_extension_cls": "the class it names inside every worker",
    "scheduler_cls": "the scheduler class it names",
    "logits_processors": "the classes it names on every token",
    "model_class_overrides": "the model classes it names",
    "reasoning_parser_plugin": "the file it names",
    "io_processor_plugin": "the plugin it names",
    "logging_config": "whatever handlers it names",
    "log_config_file": "whatever handlers the file names",
}
"""Arguments of vLLM 0.32 that import code by name, and what vLLM then runs."""
KNOWN_VALUES: Final[Mapping[str, frozenset[str]]] = {
    "distributed_executor_backend": frozenset({"mp", "ray", "uni", "external_launcher"}),
    "tokenizer_mode": frozenset(
        {"auto", "hf", "slow", "mistral", "deepseek_v32", "deepseek_v4", "deepseek_v41", "kimi_k3", "kimi_audio"}
        | {"cohere", "terratorch"}
    ),
}
"""Arguments that take a name of vLLM's or a class to import, and vLLM's names."""
FILE_ARGUMENTS: Final[Mapping[str, str]] = {
    "allowed_local_media_path": "requests read files of the server below it",
}
_IMPORTED_KEYS: Final = ("_module_path", "_cls", "auto_map", "spec_module")
"""Ends of keys inside the mappings of other arguments (``kv_transfer_config``, ``hf_overrides``) that name code."""


def checked(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The arguments normalised as those of a config are, and what is wrong with them in one line, "" for nothing."""
    try:
        return dict(EngineConfig.model_validate({"model_id": "m", "engine_kwargs": dict(kwargs)}).engine_kwargs), ""
    except ValidationError as error:
        found = [problem for detail in error.errors() for problem in detail.get("ctx", {}).get("faults", ())]
        said = [message if at[-1] in message else f"{at[-1]}: {message}" for at, message, _ in found]
        return {}, "; ".join(said) or error.errors()[0]["msg"]


def unsafe(kwargs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The arguments that make vLLM run code from elsewhere or open files, and what it does with each."""
    for key, value in kwargs.items():
        if not value:
            continue
        if key in CODE_ARGUMENTS:
            yield key, f"vLLM runs {CODE_ARGUMENTS[key]}"
        elif key in FILE_ARGUMENTS:
            yield key, FILE_ARGUMENTS[key]
        elif key in KNOWN_VALUES and value not in KNOWN_VALUES[key]:
            yield key, "vLLM imports and runs the class it names"
        elif inner := next(_imported(value), ""):
            yield f"{key}.{inner}", "vLLM imports and runs what it names"


def _imported(value: Any) -> Iterator[str]:
    """Paths of keys that name code, anywhere inside a value."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        if part and str(key).endswith(_IMPORTED_KEYS):
            yield str(key)
        yield from (f"{key}.{inner}" for inner in _imported(part))
