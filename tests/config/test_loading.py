# ruff: noqa: E501
"""Files, folders, hub ids and inline models become one app."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from quantserve.config import is_model_source, load, load_object, model_from_source
from quantserve.config.paths import WANTED
from quantserve.errors import ConfigError

Write = Callable[..., Path]


def failure(*sources: str | Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(list(sources))
    return str(caught.value)


@pytest.fixture
def checkpoint(write: Write) -> Path:
    return write("{}", "weights/my model/config.json").parent


def test_bare_models(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    app = load(["my model", "TheBloke/Llama-2-7B-chat-AWQ"])
    assert [(model.model_id, model.source) for model in app.models] == [
        ("my-model", str(checkpoint)),
        ("TheBloke/Llama-2-7B-chat-AWQ", "TheBloke/Llama-2-7B-chat-AWQ"),
    ]
    assert app.models[0].where == "my model"
    assert is_model_source("my model")
    assert is_model_source("org/name")
    assert not is_model_source("missing.yaml")
    assert not is_model_source("models/x.yaml")
    assert not is_model_source(checkpoint.parent)


def test_bare_model_options(checkpoint: Path) -> None:
    model = model_from_source(
        checkpoint, quantization="AWQ", tensor_parallel_size=2, max_model_len=512, allow_pickle=True
    )
    found = (model.quantization, model.tensor_parallel_size, model.max_model_len, model.allow_pickle)
    assert found == ("awq", 2, 512, True)
    with pytest.raises(ConfigError, match="no such file or folder"):
        model_from_source("nothing")
    with pytest.raises(ConfigError, match="num_workers: must be greater than or equal to 1, got the number 0"):
        model_from_source(checkpoint, tensor_parallel_size=0)


def test_snapshot_in_the_hugging_face_cache(write: Write) -> None:
    folder = write("{}", "models--org--name/snapshots/0123abc/config.json").parent
    assert load([folder]).models[0].model_id == "org/name"


def test_paths_start_at_the_file_then_at_the_working_directory(
    write: Write, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("{}", "configs/local/config.json")
    (tmp_path / "cwd" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    app = load(
        [
            write(
                """
                models:
                - engine_config: {model_id: a, hf_model_id: "../weights/my model", tokenizer_id: ./local}
                - engine_config: {model_id: b, hf_model_id: ./not/yet/there}
                - engine_config: {model_id: c, hf_model_id: local}
                - engine_config: {model_id: d, hf_model_id: ./here}
                - engine_config: {model_id: local}
                - engine_config: {model_id: e, hf_model_id: org/name}
                - engine_config: {model_id: f, hf_model_id: "s3://bucket/x"}
                - org/bare
                - ../weights/my model
                """,
                "configs/app.yaml",
            )
        ]
    )
    configs = tmp_path / "configs"
    assert [model.source for model in app.models] == [
        str(checkpoint),
        str(configs / "not/yet/there"),
        str(configs / "local"),
        str(tmp_path / "cwd/here"),
        str(configs / "local"),
        "org/name",
        "s3://bucket/x",
        "org/bare",
        str(checkpoint),
    ]
    assert app.models[0].engine_config.tokenizer_id == str(configs / "local")
    assert (app.models[8].model_id, app.models[8].where) == ("my-model", f"{configs}/app.yaml:11")


def test_app_file_with_everything(write: Write, checkpoint: Path) -> None:
    write("engine_config: {model_id: one}", "models/a/one.yaml")
    write("engine_config: {model_id: two}", "models/two.json.yaml")
    write("engine_config: {model_id: hidden}", "models/.git/hidden.yaml")
    write("not a config", "models/checkpoint/notes.yaml")
    write("{}", "models/checkpoint/config.json")
    path = write(
        """
        models:
        - models
        - engine_config: {model_id: three}
        - "engine_config: {model_id: four}"
        - "{engine_config: {model_id: five}}"
        - org/six
        http: {host: 0.0.0.0, port: 0, api_keys_file: keys.txt, access_log: logs/access.jsonl}
        """,
        "app.yaml",
    )
    app = load([path])
    assert [model.model_id for model in app.models] == ["two", "one", "three", "four", "five", "org/six"]
    assert app.models[2].where == f"{path}:4"
    assert (app.http.host, app.http.port, app.http.api_keys_file) == ("0.0.0.0", 0, str(path.parent / "keys.txt"))
    assert app.http.access_log == str(path.parent / "logs/access.jsonl")
    assert load([path, path]).models == app.models


def test_files_of_http_may_be_absolute(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    app = load(
        [write("models: [org/six]\nhttp: {api_keys_file: /etc/keys.txt, access_log: ~/access.jsonl}", "app.yaml")]
    )
    assert (app.http.api_keys_file, app.http.access_log) == ("/etc/keys.txt", "/home/somebody/access.jsonl")


@pytest.mark.parametrize("form", ["models: one.yaml", "models: {engine_config: {model_id: one}}", "models: [one.yaml]"])
def test_models_need_no_list(write: Write, form: str) -> None:
    write("engine_config: {model_id: one}", "one.yaml")
    assert [model.model_id for model in load([write(form, "app.yaml")]).models] == ["one"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models: []", "app.yaml:1: models: no models are given"),
        ("models:", "app.yaml:1: models: no models are given"),
        ("models: 5", "app.yaml:1: models: a path, folder, hub id or model is expected, got the number 5"),
        ("models:\n- []\n- ", "app.yaml:3: models[1]: a path, folder, hub id or model is expected, got nothing"),
        ("models:\n- one.ymal", "app.yaml:2: one.ymal: no such file or folder; did you mean "),
        ("models:\n- |\n  - a list\n  - of things", "is neither an existing path nor the YAML of a model"),
        ("models:\n- 'engine_config: {modelid: x}'", "app.yaml:2 (inline):1: engine_config.modelid: unknown key"),
        ("models:\n- 'a: [1'", "app.yaml:2 (inline):1: not valid YAML"),
        ("models:\n- \"a\\0b\"", "app.yaml:2: 'a\\x00b': no such file"),
        ("models: [~nobody/x]", "app.yaml:1: ~nobody/x: no such file or folder"),
        ("models:\n- empty", "app.yaml:2: "),
        ("models:\n- notes.txt", "notes.txt: not a config file (.yaml, .yml, .json)"),
        ("models: [one.yaml]\nhttp: {port: 70000}", "app.yaml:2: http.port: must be less than or equal to 65535, got the"),
        ("models: [one.yaml]\nhttp: {prot: 1}", "app.yaml:2: http.prot: unknown key `prot`; did you mean `port`?"),
        ("models: [one.yaml]\nhttp:\n  cors_origins:\n  - https://a.example\n  - https://b.example/chat",
         "app.yaml:5: http.cors_origins[1]: 'https://b.example/chat' is not an origin; write SCHEME://HOST or SCHEME://"),
        ("models: [one.yaml]\nhttp: {cors_origins: ['*', 'http://localhost:3000']}",
         "app.yaml:2: http.cors_origins: \"*\" allows every origin and makes the others redundant"),
        ("models: [one.yaml]\nhttp: {max_body_mb: 0}", "app.yaml:2: http.max_body_mb: must be greater than or equal to 1"),
        ("models: [one.yaml]\nmodel: x", "app.yaml:2: model: unknown key `model`; did you mean `models`? (known: explorer, "),
        ("models: [one.yaml, {engine_config: {model_id: one}}]", "app.yaml:1: 'one' has the id of another model, at "),
        ("models: [{engine_config: {model_id: a/b}}, {engine_config: {model_id: a--b}}]", "'a--b' has the route /a--b of 'a/b', at "),
        ("models: [{engine_config: {model_id: x}, enabled: false}]", "nothing to serve: all 1 models have `enabled: fals"),
    ],
)  # fmt: skip
def test_broken_apps(write: Write, text: str, expected: str) -> None:
    write("", "notes.txt")
    write("", "empty/nothing").unlink()
    write("engine_config: {model_id: one}", "one.yaml")
    assert expected in failure(write(text, "app.yaml"))


def test_a_disabled_model_is_checked_and_left_out(write: Write) -> None:
    on = write("engine_config: {model_id: a}", "on.yaml")
    off = write("engine_config: {model_id: a}\nenabled: no", "off.yaml")
    assert len(load([on, off]).models) == 1
    broken = write("engine_config: {modelid: a}\nenabled: no", "off.yaml")
    assert "modelid" in failure(on, broken)


def test_duplicates_name_both_files(write: Write) -> None:
    first, second = (write("engine_config: {model_id: a/b}", name) for name in ("one.yaml", "two.yaml"))
    assert failure(first, second).splitlines()[0] == f"{second}:1: 'a/b' has the id of another model, at {first}:1"


def test_a_file_reached_twice_is_loaded_once(write: Write, tmp_path: Path) -> None:
    path = write("engine_config: {model_id: a/b}", "x/one.yaml")
    (tmp_path / "x" / "link.yaml").symlink_to(path)
    os.symlink(tmp_path / "x", tmp_path / "x" / "loop")
    assert len(load([tmp_path / "x", path]).models) == 1


def test_problems_of_all_files_at_once(write: Write) -> None:
    one = write("engine_config: {modelid: a}", "x/one.yaml")
    two = write("a: [", "x/two.yaml")
    message = failure(one.parent, "missing.yaml")
    assert f"{one}:1: engine_config" in message
    assert f"{two}:" in message
    assert "missing.yaml: no such file or folder" in message


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nope", "nope: no such file or folder, and not a hub id (org/name)\n  fix: correct the path or the id"),
        ("one.yml", "one.yml: no such file or folder; did you mean one.yaml?"),
        (
            "https://hf.co/org/name",
            "https://hf.co/org/name: a URL, where a folder, a model of the Hub (org/name) or a bucket (s3://, gs://) is "
            "expected\n  fix: name it org/name",
        ),
        ("s3a://bucket/model", "is expected\n  fix: write s3://bucket/model"),
        ("gcs://bucket/model", "is expected\n  fix: write gs://bucket/model"),
        ("configs/two", "configs/two: no such file or folder; did you mean configs/two.yaml?"),
        (
            "configs/q",
            "not read as a hub id: a folder configs exists here\n  fix: correct the path; for a hub id write",
        ),
        (
            "empty",
            f"empty: a folder without config.json, and without config files (.yaml, .yml, .json)\n  fix: {WANTED}",
        ),
        ("notes.txt", f"notes.txt: not a config file (.yaml, .yml, .json)\n  fix: {WANTED}"),
        ("w/model.safetensors", "model.safetensors: not a config file (.yaml, .yml, .json)\n  fix: name the folder, w"),
        ("/no/such/place.yaml", "/no/such/place.yaml: no such file or folder"),
        ("x\0y", "'x\\x00y': no such file"),
        ("x" * 5000, "no such file or folder"),
        ("", "an empty name"),
        (" ", "an empty name"),
        ("adapter", "adapter: a LoRA adapter (adapter_config.json), not a model"),
        ("circle", "circle: a broken symbolic link to 'circle'"),
        ("stale", "stale: a broken symbolic link to 'nowhere'"),
        ("links", "links/loop.yaml: not a regular file"),
    ],
)
def test_sources_that_do_not_exist(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, expected: str
) -> None:
    write("engine_config: {model_id: one}", "one.yaml")
    write("engine_config: {model_id: two}", "configs/two.yaml")
    write("text", "notes.txt")
    write("", "w/model.safetensors")
    write("{}", "adapter/adapter_config.json")
    (tmp_path / "empty").mkdir()
    (tmp_path / "links").mkdir()
    for name, target in (("circle", "circle"), ("stale", "nowhere"), ("links/loop.yaml", "loop.yaml")):
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    assert expected in failure(source)


def test_a_folder_far_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantserve.config.paths.MAX_FOLDERS", 3)
    (tmp_path / "a/b/c/d/e").mkdir(parents=True)
    limits = "the limits are 1000 config files and 3 folders\n  fix: give a smaller folder, or the files"
    assert failure(tmp_path).endswith(f"too large to search: {limits}")


def test_nothing_at_all() -> None:
    assert failure() == f"nothing to serve: no models are given\n  fix: {WANTED}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(write: Write) -> None:
    path = write("engine_config: {model_id: a}")
    path.chmod(0)
    assert failure(path) == f"{path}: cannot be read: Permission denied"


def test_objects(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write("engine_config: {model_id: one}", "one.yaml")
    monkeypatch.chdir(tmp_path)
    args = {"models": ["one.yaml", {"engine_config": {"model_id": "two"}}], "http": {"port": 1}}
    app = load_object(args, "args of application x")
    assert [model.where for model in app.models] == ["one.yaml:1", "args of application x"]
    assert app.http.port == 1
    assert load_object({"engine_config": {"model_id": "two"}}, "x").models[0].model_id == "two"
    assert args["models"][1] == {"engine_config": {"model_id": "two"}}  # type: ignore[index]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "x: an empty file, a config is expected"),
        ([], "x: a mapping (`key: value`) is expected, got a list"),
        ({1: 2}, "x: : keys must be text, got 1"),
        ({"models": [object()]}, "x: models[0]: a object cannot be part of a config"),
        ({"models": [{"engine_config": {"model_id": "a", "max_total_tokens": float("nan")}}]}, "max_total_tokens: not a nu"),
        ({"models": [{"engine_config": {"modelid": "a"}}]}, "x: models[0].engine_config.modelid: unknown key"),
        ({"modles": []}, "x: modles: no config"),
    ],
)  # fmt: skip
def test_broken_objects(value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_object(value, "x")
    assert expected in str(caught.value)


def test_an_object_that_contains_itself() -> None:
    value: dict[str, object] = {}
    value["models"] = [value]
    with pytest.raises(ConfigError, match="too large or nested too deeply"):
        load_object(value, "x")


def test_a_checkpoints_config_is_not_a_config(write: Write) -> None:
    path = write('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}', "m/config.json")
    assert failure(path) == (
        f"{path}:1: the config.json of a checkpoint, not a config of a server\n  fix: name the folder, {path.parent}"
    )
