"""Whatever a file holds: an app, or a ConfigError. No traceback, no hang."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import fuzzing
from fuzzing import configs as fuzzing_configs
from quantserve.config import AppConfig, load, load_object
from quantserve.errors import ConfigError

ROOT = Path(__file__).parents[2]
SEED_TEXTS = [
    (ROOT / "models/demo.yaml").read_text(encoding="utf-8"),
    (ROOT / "models/quantization/TheBloke--Llama-2-7B-chat-AWQ.yaml").read_text(encoding="utf-8"),
    """
applications:
- {name: a, route_prefix: /, import_path: "rayllm.backend:router_application", args: {models: [org/x, {engine_config:
  {model_id: b, type: VLLMEngine, generation: {stopping_sequences: [a, 1, [2]], generate_kwargs: {do_sample: true}}},
  deployment_config: {max_concurrent_queries: 3, autoscaling_config: {smoothing_factor: 1}, ray_actor_options:
  {resources: {accelerator_type_a10: 0.1}}}, scaling_config: {num_workers: 1, resources_per_worker: {x: 1}}}]}}
""",
]


def check(data: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"app{suffix}"
        path.write_bytes(data)
        use(lambda: load([path]), folder)


def use(make: Callable[[], AppConfig], label: str) -> None:
    """Load and read everything, or get an error that says where."""
    message = ""
    try:
        app = make()
    except ConfigError as error:
        message = str(error)
    if message:
        assert message.startswith((label, "nothing to serve"))
        return
    for model in app.models:
        template = model.chat_template
        assert template is None or template
        assert isinstance(model.request_defaults, dict)
        model.deployment_config.serve_options()


def test_fuzzed_texts() -> None:
    report = fuzzing.run(fuzzing_configs.TARGET, 250, seed=15)
    assert report.failures == []
    assert report.verdicts["accepted"] > 20


@pytest.mark.parametrize(
    "merged", ["!x {a: b}", "[!x {a: b}, {c: d}]", "!!set {a}", "!!map {a: b}", "a", "[a]", "~", "[[]]"]
)
def test_merges_of_what_is_no_plain_mapping(merged: str) -> None:
    check(f"models:\n- engine_config: {{model_id: a, <<: {merged}}}\n".encode(), ".yaml")


@pytest.mark.parametrize("length", [300, 5000])
@pytest.mark.parametrize("place", ["access_log", "api_keys_file"])
def test_paths_that_the_file_system_refuses(place: str, length: int) -> None:
    check(f"models: [org/a]\nhttp: {{{place}: {'x' * length}}}\n".encode(), ".yaml")


@settings(max_examples=100, deadline=4000)
@given(data=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_arbitrary_bytes(suffix: str, data: bytes) -> None:
    check(data, suffix)


SEEDS: list[Any] = [yaml.safe_load(text) for text in SEED_TEXTS]
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([10**400, -(10**30), 1e308, "{", "{instruction}", "org/name", "../x", "1e9", "\ud800"])
)  # fmt: skip
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner), max_leaves=6
)


@settings(max_examples=300, deadline=4000)
@given(seed=st.integers(0, len(SEEDS) - 1), at=st.integers(0, 10_000), value=values)
def test_any_value_anywhere(seed: int, at: int, value: object) -> None:
    """Replace one value of a good config by anything."""
    places: list[tuple[Any, Any]] = []

    def copy(item: Any) -> Any:
        if isinstance(item, dict):
            made: Any = {key: copy(child) for key, child in item.items()}
            places.extend((made, key) for key in made)
        elif isinstance(item, list):
            made = [copy(child) for child in item]
            places.extend((made, index) for index in range(len(made)))
        else:
            made = item
        return made

    config = copy(SEEDS[seed])
    container, key = places[at % len(places)]
    container[key] = value
    use(lambda: load_object(config, "object"), "object")
