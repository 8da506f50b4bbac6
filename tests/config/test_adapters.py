"""`adapters:` of a model: names, paths, and what contradicts them."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantserve.config import load
from quantserve.errors import ConfigError

from .conftest import LoadError

ONE = "adapters: [{name: sql, source: x}]"


def test_paths_start_at_the_file(tmp_path: Path) -> None:
    (tmp_path / "sql").mkdir()
    listed = "[{name: sql, source: sql}, {name: chat, source: org/chat, revision: v1}, {name: b, source: 's3://b/f'}]"
    (tmp_path / "m.yaml").write_text(f"engine_config: {{model_id: a, adapters: {listed}}}")
    adapters = load([tmp_path / "m.yaml"]).models[0].adapters
    assert [(one.name, one.source, one.revision) for one in adapters] == [
        ("sql", str(tmp_path / "sql"), None),
        ("chat", "org/chat", "v1"),
        ("b", "s3://b/f", None),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("adapters: [{name: a, source: x}]", "adapters[0].name: 'a' is the id of the model already"),
        ("adapters: [{name: b, source: x}, {name: b, source: y}]", "adapters[1].name: 'b' is the name of adapters[0]"),
        ("adapters: [{name: '../b', source: x}]", "'../b' cannot be an id in the API"),
        ("adapters: [{name: b}]", "`source` is missing"),
        (f"{ONE}, engine_kwargs: {{enable_lora: false}}", "engine_kwargs.enable_lora: false contradicts `adapters`"),
        (f"{ONE}, frontend_kwargs: {{lora_modules: [{{name: b, path: x}}]}}", "and `adapters` both name adapters"),
        (f"{ONE}, engine_kwargs: {{max_lora_rank: 12}}", "max_lora_rank: must be one of 1, 8, 16, 32"),
        (f"{ONE}, engine_kwargs: {{max_loras: 4, max_cpu_loras: 2}}", "must not be less than max_loras (4), got 2"),
    ],
)
def test_contradictions(load_error: LoadError, text: str, expected: str) -> None:
    assert expected in "\n".join(load_error(f"engine_config: {{model_id: a, {text}}}"))


def test_names_are_unique_over_all_models(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(f"engine_config: {{model_id: {name}, {ONE}}}")
    (tmp_path / "c.yaml").write_text("engine_config: {model_id: c, adapters: [{name: a, source: x}]}")
    with pytest.raises(ConfigError) as raised:
        load([tmp_path])
    said = str(raised.value)
    assert "b.yaml:1: the adapter name 'sql' is the name of an adapter of the model at " in said
    assert "c.yaml:1: the adapter name 'a' is an id of the model at " in said


def test_a_bucket_is_a_model() -> None:
    model = load(["s3://models/team/Llama-3-AWQ"]).models[0]
    assert (model.model_id, model.source) == ("Llama-3-AWQ", "s3://models/team/Llama-3-AWQ")
