"""Ids of models from the names of folders, and folders of the Hugging Face cache."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from helpers.checkpoints import make_llama
from quantserve.checkpoint import open_checkpoint
from quantserve.config import ModelConfig, load, model_from_source
from quantserve.errors import CheckpointError, ConfigError
from quantserve.planning.compose import compose
from quantserve.planning.plan import make_plan
from quantserve.plugins.registry import Registry
from quantserve.system.homes import snapshot_in
from quantserve.target import find_target


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("模型", "模型"),
        ("模型-7B", "模型-7B"),
        ("модель_v2", "модель_v2"),
        ("modèle", "modèle"),
        (unicodedata.normalize("NFD", "modèle"), "modèle"),  # as macOS writes it
        ("मॉडल", "मॉडल"),
        ("\uff31\uff57\uff45\uff4e", "Qwen"),  # fullwidth
        ("Llama 2 (7B)", "Llama-2-7B"),
        ("a:b@c", "a-b-c"),
        (".hidden", "hidden"),
        ("😀", "model-1f600"),
        ("🎉", "model-1f389"),
        ("a\u202eb", "a-b"),
    ],
)
def test_the_id_of_a_folder(name: str, expected: str, tmp_path: Path) -> None:
    assert model_from_source(model(tmp_path / name)).model_id == expected


def test_folders_that_get_the_same_id_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'模型-a' has the id of another model, at .*模型 a"):
        load([model(tmp_path / "模型 a"), model(tmp_path / "模型 (a)")])


@pytest.mark.parametrize("text", ["a\u202eb", "a b", "\u0301a", "a/-b", "a%20b", "😀", "a\u200bb", "模" * 67])
def test_texts_that_are_no_ids(text: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be an id in the API|at most 200 fit"):
        ModelConfig.model_validate({"engine_config": {"model_id": text}})


def test_an_id_is_composed() -> None:
    given = ModelConfig.model_validate({"engine_config": {"model_id": unicodedata.normalize("NFD", "org/modèle")}})
    assert given.model_id == "org/modèle"


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """A repository in the cache, with one snapshot."""
    repository = tmp_path / "hub" / "models--org--name"
    model(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (repository / "blobs").mkdir()
    return repository


def test_the_only_snapshot_is_taken(cached: Path, tmp_path: Path) -> None:
    snapshot = str(cached / "snapshots" / "abc")
    for given in (cached, cached / "snapshots", snapshot):
        (loaded,) = load([given]).models
        assert (loaded.model_id, loaded.source) == ("org/name", snapshot)
        assert model_from_source(given).source == snapshot
        assert str(open_checkpoint(str(given)).path) == snapshot
    file = tmp_path / "m.yaml"
    file.write_text(f"engine_config: {{model_id: mine, hf_model_id: {cached}}}")
    assert load([file]).models[0].source == snapshot


def test_several_snapshots_are_named(cached: Path, tmp_path: Path) -> None:
    model(cached / "snapshots" / "aaa")
    message = r"2 snapshots of org/name are in it: aaa, abc \(main\)\n  fix: name one, such as .*abc, or org/name"
    for given in (cached, cached / "snapshots"):
        with pytest.raises(ConfigError, match=message):
            load([given])
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(str(given))
    file = tmp_path / "m.yaml"
    file.write_text(f"engine_config: {{model_id: mine, hf_model_id: {cached}}}")
    with pytest.raises(ConfigError, match=r"m.yaml:1: engine_config.hf_model_id: .*2 snapshots of org/name"):
        load([file])
    assert load([cached / "snapshots" / "aaa"]).models[0].model_id == "org/name"


def test_no_snapshot_at_all(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"no snapshot of org/name is in it\n  fix: `hf download org/name`"):
        load([repository])
    assert snapshot_in(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["模型-7B", "模型", "модель", "org--é"])
def test_rays_name_of_the_application_is_ascii_and_its_own(name: str, tmp_path: Path) -> None:
    names = set()
    for folder in (name, name + "二"):
        made = make_llama(tmp_path / folder, "fp16")
        plan = make_plan(compose(model_from_source(made, max_model_len=128), Registry.load({}), find_target("l4")))
        assert plan.app_name.isascii()
        assert plan.app_name[0].isalnum()
        assert (plan.model_id, plan.route_prefix) == (folder, f"/{folder}")
        names.add(plan.app_name)
    assert len(names) == 2
