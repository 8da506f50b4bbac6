"""One server with three models for the tests of this folder, which leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ..server import KEY, Server, model, serve

MODELS = ("demo-fp16", "org/demo-awq", "demo-squeezellm")
NARROW = MODELS[1]
"""Has a short queue."""


@pytest.fixture(scope="package")
def server(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`quantserve serve` of three models, with a key; the third has request defaults, the first calls tools."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "keys").write_text(f"# for tests\n{KEY}\n")
    defaults = {
        "generate_kwargs": {"temperature": 0, "max_tokens": 9},
        "stopping_sequences": ["method"],
    }
    narrow = model(NARROW, demo / "awq", model_description="four bits")
    narrow["deployment_config"] = {"max_ongoing_requests": 8, "max_queued_requests": 12}
    app = {
        "http": {"api_keys_file": "keys"},
        "explorer": {"votes": True, "price_per_hour": 1.5},
        "models": [
            model(
                "demo-fp16",
                demo / "checkpoint",
                engine_kwargs={"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}},
                frontend_kwargs={"enable_auto_tool_choice": True, "tool_call_parser": "hermes"},
            ),
            narrow,
            model("demo-squeezellm", demo / "squeezellm", generation=defaults),
        ],
    }
    (folder / "app.yaml").write_text(yaml.safe_dump(app))
    running = serve(folder / "app.yaml")
    try:
        running.ready().key = KEY
        yield running
    finally:
        running.stop()
