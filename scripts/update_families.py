"""Write core/quantserve/families.json anew from the installed transformers and vLLM.

    .venv/bin/python scripts/update_families.py [--check]

The file holds, for every model type, what its configuration class adds to a config.json that leaves fields out, and
for every architecture whether and how vLLM serves it. `quantserve check` reads it instead of importing either package.
With ``--check`` nothing is written; the exit code is 1 when the file differs from what the packages give.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", VLLM_LOGGING_LEVEL="ERROR", VLLM_PLUGINS="")

TARGET = Path(__file__).resolve().parents[1] / "core" / "quantserve" / "families.json"
# Fields that fix no shape, length, dtype or attention kind.
_USELESS = re.compile(
    r"dropout|token_id$|token_index$|^initializer|_eps$|epsilon|_std$|_coef|loss|^use_cache$|output_|^return_|_act$|activation"
    r"|^hidden_act|^problem_type|^chunk_size_feed|jitter|scale$|scaling_factor$|_range$|_bias_init|clip|mask_|spec_aug|ctc|xvector"
    r"|gradient|logit|softcap|time_step|^audio|^image|^vision|^video|^patch|classifier|summary_|tdnn|layerdrop|_prob$|seed$"
    r"|^transformers_version|^architectures|^dtype$|^torch_dtype|theta|multiplier|^name|^tokenizer|^prefix|^task"
)
_PATHS = (
    ("decoder",), ("generator",), ("text_config",), ("text_encoder",), ("thinker_config", "text_config"),
    ("vlm_config", "text_config"), ("language_config",), ("llm_config",), ("decoder_config",),
)  # fmt: skip
_SIZES = (4, 5, 6, 7, 8, 9, 12, 13, 24, 26)
_PERIOD_KEYS = (
    "sliding_window_pattern", "global_attn_every_n_layers", "full_attention_interval", "layer_period",
    "attn_layer_period", "global_attn_period", "no_rope_layer_interval",
)  # fmt: skip


def gathered() -> dict[str, Any]:
    """Everything the file holds."""
    import transformers
    import vllm

    return {
        "transformers": transformers.__version__,
        "vllm": vllm.__version__,
        "architectures": architectures(),
        "tasks": tasks(),
        "quantization": quantization(),
        "models": dict(sorted(models())),
    }


# --- vLLM's architectures ------------------------------------------------------------------------------


def architectures() -> dict[str, Any]:
    """Architectures by how vLLM treats them: served by a class of its own, by transformers, or no longer."""
    from vllm.model_executor.models import registry
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    kinds = {
        "generate": registry._TEXT_GENERATION_MODELS,
        "multimodal": registry._MULTIMODAL_MODELS,
        "embed": {**registry._EMBEDDING_MODELS, **registry._LATE_INTERACTION_MODELS},
        "classify": {
            **registry._REWARD_MODELS,
            **registry._TOKEN_CLASSIFICATION_MODELS,
            **registry._SEQUENCE_CLASSIFICATION_MODELS,
        },
        "draft": registry._SPECULATIVE_DECODING_MODELS,
        "transformers": registry._TRANSFORMERS_SUPPORTED_MODELS,
    }
    served: dict[str, str] = {}
    for kind, table in kinds.items():
        for name in table:
            served.setdefault(name, kind)
    source = inspect.getsource(ModelArchConfigConvertorBase.is_deepseek_mla)
    latent = sorted(
        set(re.findall(r'"([a-z0-9_]+)"', source.partition("eagle")[0])) - {"model_type", "compress_ratios"}
    )
    return {
        "served": dict(sorted(served.items())),
        "by_transformers": sorted(set(by_transformers()) - served.keys()),
        "no_longer": dict(sorted(registry._PREVIOUSLY_SUPPORTED_MODELS.items())),
        "by_plugin": dict(sorted(registry._OOT_SUPPORTED_MODELS.items())),
        "latent_types": [name for name in latent if name not in ("head_dim", "kv_lora_rank")],
    }


def tasks() -> list[tuple[str, str]]:
    """Suffixes of class names and the task vLLM takes a class for; it exchanges them to serve another task."""
    from vllm.config.model import _SUFFIX_TO_DEFAULTS

    kinds = {"none": "generate"}
    return [(suffix, kinds.get(convert, convert)) for suffix, (_, convert) in _SUFFIX_TO_DEFAULTS]


def quantization() -> list[str]:
    """Names of the quantization methods vLLM has."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    return sorted(QUANTIZATION_METHODS)


def by_transformers() -> Iterator[str]:
    """Classes of transformers that vLLM runs through its Transformers backend."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    tables = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_MAPPING_NAMES,
    )
    # vLLM compiles the decoder's forward, of which it wants this argument.
    without_positions = {
        name
        for kind, name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if (base := getattr(transformers, str(auto.MODEL_MAPPING_NAMES.get(kind)), None))
        and "position_ids" not in inspect.signature(base.forward).parameters
    }
    for name in {
        cls for table in tables for value in table.values() for cls in ([value] if isinstance(value, str) else value)
    }:
        try:
            cls = getattr(transformers, name)
            if (
                issubclass(cls, transformers.PreTrainedModel)
                and (cls.is_backend_compatible() or cls._can_set_attn_implementation())
                and name not in without_positions
            ):
                yield name
        except Exception:
            continue  # needs a package that is not installed


# --- model types ---------------------------------------------------------------------------------------


def models() -> Iterator[tuple[str, dict[str, Any]]]:
    """Model type -> what its configuration class adds; nothing for types without a language model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
    from vllm.transformers_utils.config import _CONFIG_REGISTRY, MODEL_MAPPING_NAMES

    for name in sorted({*CONFIG_MAPPING_NAMES, *_CONFIG_REGISTRY}):
        try:
            cls = _CONFIG_REGISTRY[name] if name in _CONFIG_REGISTRY else CONFIG_MAPPING[name]
            made = quiet(cls)
        except Exception:
            yield name, {}  # known, but it has no defaults to complete a file with
            continue
        entry = entry_of(cls, made)
        entry["architecture"] = MODEL_MAPPING_NAMES.get(name)
        entry["strict"] = name not in _CONFIG_REGISTRY  # transformers' classes refuse values of another type
        text = made
        for path in _PATHS:
            found: Any = made
            for key in path:
                found = getattr(found, key, None)
            if found is not None and not isinstance(found, (dict, str)):
                text = found
                entry["text"] = list(path)
                entry["text_type"] = found.model_type
                break
        yield name, {key: value for key, value in entry.items() if value} if is_language(text) else {}


def is_language(text: Any) -> bool:
    """Whether a configuration is of something that has tokens."""
    return getattr(text, "vocab_size", None) is not None


def quiet(cls: Callable[..., Any], **given: Any) -> Any:
    """An instance, without the warnings of its class."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(**given)


def entry_of(cls: Any, made: Any) -> dict[str, Any]:
    """Defaults, aliases and layer rule of one configuration class."""
    entry: dict[str, Any] = {"defaults": dict(sorted(defaults(cls))), "aliases": dict(sorted(aliases(cls)))}
    if "use_sliding_window" in entry["defaults"]:
        on = quiet(cls, use_sliding_window=True, sliding_window=1024)
        off = quiet(cls, use_sliding_window=False, sliding_window=1024)
        if on.sliding_window is not None and off.sliding_window is None:
            entry["window_needs"] = "use_sliding_window"
    for field in ("layer_types", "mlp_layer_types"):
        if rule := layer_rule(cls, made, field):
            entry[field] = rule
    return entry


def defaults(cls: Any) -> Iterator[tuple[str, Any]]:
    """Fields a file may leave out, with the value they then have; None is left out."""
    pairs = [(field.name, field.default) for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    # A class with an __init__ of its own, as vLLM's are, has the defaults there.
    pairs += [(p.name, p.default) for p in inspect.signature(cls.__init__).parameters.values()]
    for name, value in dict(pairs).items():
        plain = isinstance(value, (bool, int, float, str)) and not isinstance(value, dataclasses.Field)
        if plain and not _USELESS.search(name) and not name.startswith("_"):
            yield name, value


def aliases(cls: Any) -> Iterator[tuple[str, str]]:
    """attribute -> the field it reads, where the class renames fields."""
    for name, real in (getattr(cls, "attribute_map", None) or {}).items():
        if not _USELESS.search(name):
            yield name, real


def layer_rule(cls: Any, made: Any, field: str) -> dict[str, Any] | None:
    """The rule by which a class fills a list with one kind a layer, found by trying it with several depths.

    ``{"all": kind}``; ``{"period": p, "phase": r, "at": kind, "else": kind, "last": kind, "key": field}``: layer i has
    kind ``at`` where i % p == r; ``{"first": n, "kind": a, "then": b, "key": field}``;
    ``{"from": "max_window_layers"}``: sliding from that layer on; ``{"unknown": true}``: another rule. None where the
    class fills no list.
    """
    if not isinstance(getattr(made, field, None), (list, tuple)):
        return None
    seen: dict[int, list[str]] = {}
    for count in _SIZES:
        try:
            seen[count] = list(getattr(quiet(cls, num_hidden_layers=count), field))
        except Exception:
            continue
    if len(seen) < 5 or any(len(kinds) != count for count, kinds in seen.items()):
        return {"unknown": True}
    rule = fitted(seen)
    if rule is None:
        return {"unknown": True}
    for key in _PERIOD_KEYS:
        if "period" in rule and takes(cls, key) and changes_period(cls, key, field, rule):
            rule["key"] = key
            break
    if "first" in rule:
        for key in ("first_k_dense_replace",):
            if takes(cls, key) and list(getattr(quiet(cls, **{key: 2}), field))[:3] == [rule["kind"]] * 2 + [
                rule["then"]
            ]:
                rule["key"] = key
    if rule == {"all": "full_attention"} and window_from(cls, field):
        return {"from": "max_window_layers"}
    return rule


def fitted(seen: Mapping[int, list[str]]) -> dict[str, Any] | None:
    """The simplest rule that gives every list."""
    longest = max(seen.values(), key=len)
    kinds = sorted(set(longest))
    if len(kinds) == 1:
        rule: dict[str, Any] = {"all": kinds[0]}
        return rule if all(apply(rule, count) == given for count, given in seen.items()) else None
    if len(kinds) != 2:
        return None
    candidates: list[dict[str, Any]] = []
    for at, other in (kinds, kinds[::-1]):
        candidates += [{"first": n, "kind": at, "then": other} for n in range(1, 5)]
        candidates += [
            {"period": p, "phase": r, "at": at, "else": other, **last}
            for p in range(2, 9)
            for r in range(p)
            for last in ({}, {"last": at})
        ]
    return next((rule for rule in candidates if all(apply(rule, n) == given for n, given in seen.items())), None)


def apply(rule: Mapping[str, Any], count: int) -> list[str]:
    """The list a rule gives for so many layers."""
    if "all" in rule:
        return [rule["all"]] * count
    if "first" in rule:
        return [rule["kind"] if i < rule["first"] else rule["then"] for i in range(count)]
    made = [rule["at"] if i % rule["period"] == rule["phase"] else rule["else"] for i in range(count)]
    return [*made[:-1], rule["last"]] if "last" in rule else made


def takes(cls: Any, key: str) -> bool:
    """Whether the class keeps or uses this argument."""
    try:
        quiet(cls, **{key: 3})
    except Exception:
        return False
    return True


def changes_period(cls: Any, key: str, field: str, rule: Mapping[str, Any]) -> bool:
    """Whether the argument sets the period."""
    period = 3 if rule["period"] != 3 else 4
    # A phase at the end of a period moves with it.
    phase = period - 1 if rule["phase"] == rule["period"] - 1 else rule["phase"]
    try:
        given = list(getattr(quiet(cls, num_hidden_layers=13, **{key: period}), field))
    except Exception:
        return False
    return given == apply({**rule, "period": period, "phase": phase}, 13)


def window_from(cls: Any, field: str) -> bool:
    """Whether layers from max_window_layers on slide once a window is in use."""
    given = {"num_hidden_layers": 6, "max_window_layers": 4, "sliding_window": 1024, "use_sliding_window": True}
    try:
        return list(getattr(quiet(cls, **given), field)) == ["full_attention"] * 4 + ["sliding_attention"] * 2
    except Exception:
        return False


def written(data: Mapping[str, Any]) -> str:
    """One line a model type, so that a change can be read."""
    models = data["models"]
    rest = json.dumps({**data, "models": {}}, indent=1)[: -len("{}\n}")]
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in models.items())
    return f"{rest}{{\n{lines}\n }}\n}}\n"


def main() -> int:
    """Write or check the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args()
    text = written(gathered())
    if not options.check:
        TARGET.write_text(text)
        return 0
    same = TARGET.read_text() == text
    print(f"{TARGET.name} {'agrees with' if same else 'differs from'} the installed transformers and vLLM")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
