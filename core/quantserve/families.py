"""Model families as data: what config.json means when it leaves fields out, and what vLLM 0.32 serves.

families.json is generated from the pinned transformers and vLLM by scripts/update_families.py, and a test holds it
against both. Nothing of either is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal

Service = Literal["served", "transformers", "no longer", "plugin", "unknown"]
MAX_LAYERS = 1024
VLLM = "0.32"
"""The version of vLLM that is described."""

# Where the language model's section is in a file of a type that transformers does not know (remote code).
_SECTIONS = (("text_config",), ("llm_config",), ("thinker_config", "text_config"), ("language_config",))


@cache
def _data() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(files("quantserve").joinpath("families.json").read_text())
    return loaded


def entry(model_type: object) -> Mapping[str, Any] | None:
    """The generated entry of a model type; None when neither transformers nor vLLM has a configuration class for it."""
    found: Mapping[str, Any] | None = _data()["models"].get(model_type) if isinstance(model_type, str) else None
    return found


def latent_types() -> frozenset[str]:
    """Model types whose attention vLLM computes as multi-head latent attention."""
    return frozenset(_data()["architectures"]["latent_types"])


def service(architectures: Sequence[str]) -> tuple[Service, str]:
    """How vLLM serves a model: the best of its architectures.

    Returns:
        ``served`` and the kind (``generate``, ``multimodal``, ``embed``, ``classify``, ``draft``); ``transformers``
        for its Transformers backend; ``no longer`` and the last version that did; ``plugin`` and its address; or
        ``unknown``.
    """
    table = _data()["architectures"]
    for name in architectures:
        if kind := table["served"].get(name):
            return "served", kind
        if base := _converted(name, table["served"]):
            return "served", base
    for name in architectures:
        if name in table["by_transformers"]:
            return "transformers", "generate"
    for name in architectures:
        if version := table["no_longer"].get(name):
            return "no longer", version
        if address := table["by_plugin"].get(name):
            return "plugin", address
    return "unknown", ""


def _converted(name: str, served: Mapping[str, str]) -> str:
    """The task of a class that vLLM serves on another class of the same family, "" when there is none."""
    tasks = _data()["tasks"]
    for suffix, task in tasks:
        if name.endswith(suffix):
            stem = name.removesuffix(suffix)
            return str(task) if any(stem + other in served for other, _ in tasks) else ""
    return ""


def quantization_methods() -> frozenset[str]:
    """Names of vLLM's own quantization methods."""
    return frozenset(_data()["quantization"])


# --- config.json, completed -----------------------------------------------------------------------------


def section_path(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Where the language model's config is: ``("text_config",)``, or ``()`` when it is the file itself."""
    known = entry(config.get("model_type"))
    if known:
        return tuple(known.get("text", ()))
    return next((path for path in _SECTIONS if isinstance(_at(config, path), Mapping)), ())


def section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's config as the file spells it; empty where it has none."""
    found = _at(config, section_path(config))
    return found if isinstance(found, Mapping) else {}


def completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's config as transformers completes it.

    Fields that the file leaves out have the defaults of its configuration class, and a field that the class reads
    under two names (``n_embd``, ``hidden_size``) has both. Of a type that is not known, the section as it is. Empty
    when the language model is another repository's (Ultravox).
    """
    if isinstance(config.get("text_model_id"), str):
        return {}
    path = section_path(config)
    given = section(config)
    outer = entry(config.get("model_type"))
    if path and not given and ("num_hidden_layers" in config or "hidden_size" in config):
        given = {key: value for key, value in config.items() if key != "model_type"}  # a flat file, as Qwen2-VL's
    model_type = given.get("model_type")
    if path and not isinstance(model_type, str) and outer is not None:
        model_type = outer.get("text_type")
    known = entry(model_type)
    tied = _tied_by_outer(config, outer) if path else {}
    if not known:
        return {**given, **tied}
    made = {**known.get("defaults", {}), **given, **tied}
    for name, real in known.get("aliases", {}).items():
        value = given.get(real, given.get(name, made.get(real)))
        if value is not None or real in given:
            made[name] = made[real] = value
    if isinstance(model_type, str):
        made["model_type"] = model_type
    if (switch := known.get("window_needs")) and not made.get(switch):
        made["sliding_window"] = None
    return made


def _tied_by_outer(config: Mapping[str, Any], outer: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """``tie_word_embeddings`` of a multimodal model, which is the whole model's: vLLM copies it into the section."""
    key = "tie_word_embeddings"
    value = config.get(key, (outer or {}).get("defaults", {}).get(key))
    return {} if value is None else {key: value}


def layer_list(config: Mapping[str, Any], field: str, layers: int) -> list[str] | None:
    """A list with one kind a layer (``layer_types``, ``mlp_layer_types``), as given or as its class fills it.

    Args:
        config: a completed config.
        layers: number of layers; the list has as many.

    Returns:
        None when the class fills no such list, or by a rule that is not known, or the list is not usable.
    """
    given = config.get(field)
    if isinstance(given, list) and given:
        usable = len(given) >= layers and all(isinstance(kind, str) for kind in given[:layers])
        return list(given[:layers]) if usable else None
    known = entry(config.get("model_type"))
    rule = known.get(field) if known else None
    if rule is None or not 0 < layers <= MAX_LAYERS:
        return None
    made = list(_kinds(rule, config, layers))
    return made if len(made) == layers else None


def _kinds(rule: Mapping[str, Any], config: Mapping[str, Any], layers: int) -> Iterator[str]:
    if "all" in rule:
        yield from [rule["all"]] * layers
    elif "from" in rule:
        start = config.get(rule["from"])
        slides = bool(config.get("sliding_window")) and isinstance(start, int)
        for index in range(layers):
            yield "sliding_attention" if slides and index >= int(start or 0) else "full_attention"
    elif "first" in rule:
        count = _number(config.get(rule.get("key", "")), rule["first"])
        for index in range(layers):
            yield rule["kind"] if index < count else rule["then"]
    elif "period" in rule:
        period, phase = _number(config.get(rule.get("key", "")), rule["period"]), rule["phase"]
        if phase == rule["period"] - 1:
            phase = period - 1
        for index in range(layers):
            last = "last" in rule and index == layers - 1
            yield rule["last"] if last else rule["at"] if period and index % period == phase else rule["else"]


def _number(value: object, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 20 else default


def _at(config: Mapping[str, Any], path: Sequence[str]) -> object:
    found: object = config
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
