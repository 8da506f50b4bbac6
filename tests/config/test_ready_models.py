"""The shipped configs, the JSON Schema and the argument names stay true."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from quantserve.config import AppConfig, ModelConfig, json_schema, load
from quantserve.config.engine_args import ENGINE, FRONTEND, SERVER

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "models").rglob("*.yaml"))


@cache
def app(path: Path) -> AppConfig:
    return load([path])


def test_the_set_is_complete() -> None:
    names = {path.relative_to(ROOT / "models").as_posix() for path in FILES}
    for size in ("7b", "13b", "70b"):
        assert f"continuous_batching/meta-llama--Llama-2-{size}-chat-hf.yaml" in names
        assert f"quantization/meta-llama--Llama-2-{size}-chat-hf.yaml" in names
        assert f"quantization/TheBloke--Llama-2-{size.upper()}-chat-AWQ.yaml" in names
        if size != "70b":
            assert f"quantization/squeeze-ai-lab--sq-llama-2-{size}-w4-s0.yaml" in names
    assert len(names) == 19
    assert len(load([ROOT / "models"]).models) == 21


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_ready_model(path: Path) -> None:
    loaded = app(path)
    assert loaded.notes == []
    for model in loaded.models:
        seqs, limit = model.engine_kwargs["max_num_seqs"], model.deployment_config.max_ongoing_requests
        assert limit is not None
        assert model.max_model_len
        assert model.engine_kwargs.get("max_num_batched_tokens", 2048) in (2048, 4096, 8192)
        assert "trust_remote_code" not in model.engine_kwargs
        scaling = model.deployment_config.autoscaling_config
        if path.name == "demo.yaml":
            assert (model.scaling_config.num_gpus_per_worker, model.max_model_len, seqs) == (0.3, 512, 16)
            assert Path(model.source).parent == ROOT / "examples/demo-model"
            assert model.quantization == model.model_id.removeprefix("demo-")
        elif path.name == "smollm2.yaml":
            assert Path(model.source).is_relative_to(ROOT / "build/smollm2")
        else:
            assert limit == seqs
            assert scaling is not None
            assert scaling.target_ongoing_requests
            assert scaling.target_ongoing_requests < limit
            assert scaling.max_replicas > 1
            assert model.model_id.replace("/", "--") == path.stem


def test_readme_table_agrees_with_the_files() -> None:
    rows = re.findall(
        r"^\| \[[^]]+\]\(([^)]+)\) \| (\S+|16 bits) \| (\d+) x [^|]+\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$",
        (ROOT / "models/README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(rows) == 14
    for name, method, workers, context, seqs, target, most in rows:
        (model,) = app(ROOT / "models" / name).models
        scaling = model.deployment_config.autoscaling_config
        assert scaling is not None
        found = (model.tensor_parallel_size, model.max_model_len, model.engine_kwargs["max_num_seqs"])
        assert found == (int(workers), int(context), int(seqs)), name
        assert (scaling.target_ongoing_requests, scaling.max_replicas) == (int(target), int(most)), name
        assert (model.quantization or "16 bits") == method, name


def validator() -> Any:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_ready_models_follow_the_json_schema(path: Path) -> None:
    validator().validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "text",
    [
        "engine_config: {modelid: a}",
        "engine_config: {model_id: a, engine_kwargs: {tensor_parallel_size: 2}}",
        "engine_config: {model_id: a}\nscaling_config: {num_workers: 0}",
        "models: []",
        "models: [3]",
        "deployment_config: {}",
    ],
)
def test_json_schema_refuses(text: str) -> None:
    assert not validator().is_valid(yaml.safe_load(text))


def test_every_key_is_described() -> None:
    for name, definition in json_schema()["$defs"].items():
        assert definition.get("description"), name
        for key, value in definition.get("properties", {}).items():
            assert value.get("description"), (name, key)


def test_argument_names_are_those_of_the_installed_vllm() -> None:
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    folder = Path(next(iter(spec.submodule_search_locations)))

    def names(path: str, start: str, end: str) -> set[str]:
        text = (folder / path).read_text(encoding="utf-8")
        part = text[text.index(start) : text.index(end)]
        return set(re.findall(r"^    ([a-z][a-z_0-9]*): ", part, re.MULTILINE))

    assert names("engine/arg_utils.py", "class EngineArgs", "class AsyncEngineArgs") | {"enable_log_requests"} == ENGINE
    cli = "entrypoints/launchers/cli_args.py"
    assert names(cli, "class BaseFrontendArgs", "class FrontendArgs") - ENGINE == FRONTEND
    assert names(cli, "class FrontendArgs", "def resolve_default") == SERVER


def test_imports_stay_light() -> None:
    code = (
        "import sys, quantserve.config as c; c.load(sys.argv[1:]); c.json_schema(); "
        "heavy = {'torch', 'vllm', 'ray', 'transformers', 'numpy', 'jinja2'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT / "models")], check=True, timeout=300)


def test_models_are_values() -> None:
    """A model goes through JSON and comes back, as a plan or a Ray Serve config needs it."""
    for path in FILES:
        for model in app(path).models:
            again = ModelConfig.model_validate_json(model.model_dump_json(exclude_none=True))
            assert again.model_dump() == model.model_dump()
