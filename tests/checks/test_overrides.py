"""hf_overrides count before anything is judged, as vLLM applies them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import make_llama
from quantserve.checkpoint import Checkpoint, overridden
from quantserve.config import ModelConfig
from quantserve.planning.compose import compose
from quantserve.plugins.registry import Registry
from quantserve.target import find_target


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.load()


def codes(folder: Path, registry: Registry, tokens: int, overrides: dict[str, Any]) -> set[str]:
    engine = {
        "model_id": "m",
        "hf_model_id": str(folder),
        "max_total_tokens": tokens,
        "engine_kwargs": {"hf_overrides": overrides},
    }
    composition = compose(ModelConfig.model_validate({"engine_config": engine}), registry, find_target("l4"))
    return {finding.code for finding in composition.errors}


def test_a_shorter_context_refuses_and_a_longer_one_permits(tmp_path: Path, registry: Registry) -> None:
    folder = make_llama(tmp_path / "m")
    assert codes(folder, registry, 4096, {}) == set()
    assert codes(folder, registry, 4096, {"max_position_embeddings": 2048}) == {"context-too-long"}
    assert codes(folder, registry, 8192, {}) == {"context-too-long"}
    assert codes(folder, registry, 8192, {"max_position_embeddings": 8192}) == set()


def test_wrong_sizes_contradict_the_files(tmp_path: Path, registry: Registry) -> None:
    folder = make_llama(tmp_path / "m")
    assert "model-tensors-wrong-shape" in codes(folder, registry, 1024, {"hidden_size": 512})


def test_sections_are_merged_and_other_mappings_replaced() -> None:
    config = {
        "model_type": "llava",
        "text_config": {"hidden_size": 64, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    }
    checkpoint = overridden(
        Checkpoint.from_tensors(config), {"text_config": {"vocab_size": 9, "rope_scaling": {"rope_type": "linear"}}}
    )
    text = checkpoint.text_config
    assert (text["hidden_size"], text["vocab_size"], text["rope_scaling"]) == (64, 9, {"rope_type": "linear"})


@pytest.mark.parametrize("overrides", [None, {}, "text", 7, []])
def test_what_is_no_mapping_changes_nothing(overrides: object) -> None:
    checkpoint = Checkpoint.from_tensors({"hidden_size": 64})
    assert overridden(checkpoint, overrides) is checkpoint
