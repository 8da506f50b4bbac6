"""families.json and what is derived from it, held against the installed transformers and vLLM."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantserve import families
from quantserve.checkpoint import Checkpoint
from quantserve.model.attention import attention_layers, is_encoder, read_heads
from quantserve.model.context import context_limit

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# Values real files spell out, or leave to the class.
VARIED: dict[str, list[Any]] = {
    "num_hidden_layers": [2, 5, 12, 31],
    "num_attention_heads": [8, 16],
    "num_key_value_heads": [2, 8, None],
    "head_dim": [64, 128, None],
    "hidden_size": [512, 1024],
    "sliding_window": [512, 4096, None],
    "use_sliding_window": [True, False],
    "sliding_window_pattern": [2, 6],
    "max_window_layers": [1, 3],
    "max_position_embeddings": [2048, 32768],
    "model_max_length": [8192],
    "seq_length": [1024],
    "full_attention_interval": [2, 4],
    "num_kv_shared_layers": [2],
}
ROPE: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
]
# Classes that compute a number in a way no field tells; nobody changes these fields in files that are served.
LEFT_OUT = {
    "cohere2_moe": "keeps rope_scaling beside rope_parameters, of which vLLM reads the latter",
    "deepseek_ocr2_text": "replaces head_dim by hidden_size / num_attention_heads",
    "inkling_model": "fixes its heads",
    "modernbert-decoder": "has its window under another name",
    "xlnet": "takes -1 for no limit",
}


def text_types() -> list[str]:
    """Model types whose config is a language model's own."""
    data = families._data()["models"]
    return sorted(
        name for name, entry in data.items() if entry.get("defaults") and "text" not in entry and name not in LEFT_OUT
    )


def random_config(model_type: str, seed: int) -> dict[str, Any]:
    chosen = random.Random(f"{model_type}{seed}")
    known = families.entry(model_type) or {}
    real = {**{name: name for name in VARIED}, **known.get("aliases", {})}
    config: dict[str, Any] = {"model_type": model_type, "architectures": ["LlamaForCausalLM"]}
    for name, values in VARIED.items():
        if chosen.random() < 0.5:
            config[real[name]] = chosen.choice(values)
    if chosen.random() < 0.4:
        config["rope_scaling"] = chosen.choice(ROPE)
    return config


def as_vllm(config: dict[str, Any]) -> Any:
    """The config object vLLM works with; None where transformers refuses the values."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from vllm.transformers_utils.config import _CONFIG_REGISTRY, patch_rope_parameters

    kind = config["model_type"]
    cls = _CONFIG_REGISTRY[kind] if kind in _CONFIG_REGISTRY else CONFIG_MAPPING[kind]
    try:
        made = cls.from_dict(dict(config))
        patch_rope_parameters(made)
    except Exception:
        return None
    return made


def test_the_data_is_that_of_the_installed_packages() -> None:
    ran = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "update_families.py"), "--check"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + "\nfix: python scripts/update_families.py"


def test_sizes_heads_lengths_and_layers_are_vllms() -> None:
    """Every language model type with random fields: each number equals vLLM's, or is not given."""
    from vllm.config.model import _get_and_verify_max_len
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )

    compared = {"heads": 0, "context": 0, "layers": 0}
    wrong: list[str] = []
    for kind in text_types():
        for seed in range(4):
            config = random_config(kind, seed)
            made = as_vllm(config)
            if made is None:
                continue
            checkpoint = Checkpoint.from_tensors(config)
            text = made.get_text_config()
            convertor = MODEL_ARCH_CONFIG_CONVERTORS.get(kind, ModelArchConfigConvertorBase)(made, text)
            if convertor.get_per_layer_hf_configs() is not None:
                continue
            try:
                arch = convertor.convert()
            except (ValueError, AttributeError):
                continue  # vLLM has no such model itself
            limit = context_limit(checkpoint)
            heads = read_heads(checkpoint)
            if heads is not None and arch.head_size and heads.query == arch.total_num_attention_heads:
                compared["heads"] += 1
                theirs = (arch.head_size, 1 if arch.is_deepseek_mla else arch.total_num_kv_heads)
                expanded = not arch.is_deepseek_mla and getattr(text, "kv_lora_rank", None)
                if (heads.size, heads.kv) != theirs and not expanded:
                    wrong.append(f"{kind}: heads {heads} instead of {theirs}: {config}")
            served = _get_and_verify_max_len(text, arch, None, None, False, None)
            compared["context"] += 1
            if limit.default != served:
                wrong.append(f"{kind}: context {limit} instead of {served}: {config}")
            if is_encoder(checkpoint):
                continue
            kinds, theirs_kinds = attention_layers(checkpoint), getattr(text, "layer_types", None)
            if kinds is not None and theirs_kinds and "block" not in str(theirs_kinds[0]):
                compared["layers"] += 1
                windows = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
                expected = sum(bool(getattr(text, windows.get(name, ""), None)) for name in theirs_kinds)
                shared = getattr(text, "num_kv_shared_layers", 0) or 0
                if not shared and kinds.count("window") != expected:
                    wrong.append(f"{kind}: {kinds.count('window')} windows instead of {expected}: {config}")
    assert not wrong, f"{len(wrong)} of {sum(compared.values())}\n" + "\n".join(wrong[:40])
    assert compared["context"] > 400, compared
    assert compared["heads"] > 300, compared
    assert compared["layers"] > 60, compared


def test_every_architecture_vllm_lists_is_known() -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    table = families._data()["architectures"]
    listed = set(table["served"]) | set(table["by_transformers"])
    assert {name for name in ModelRegistry.get_supported_archs() if not name.startswith("Transformers")} <= listed


def test_transformers_refuses_the_types_that_check_refuses() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from quantserve.checks.model import _INTEGERS

    accepted = []
    for kind in text_types():
        known = families.entry(kind) or {}
        if not known.get("strict") or kind not in CONFIG_MAPPING:
            continue
        wrong: dict[str, Any] = {key: "x" for key in _INTEGERS if type(known["defaults"].get(key)) is int}
        for key, value in {**wrong, "rope_scaling": "text", "rope_parameters": [1]}.items():
            try:
                CONFIG_MAPPING[kind](**{key: value})
            except Exception:
                continue
            accepted.append(f"{kind}: {key}")
    assert not accepted
