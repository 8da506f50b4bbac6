"""A quantized model from a bucket with two LoRA adapters: served by name, with the tokens of merged weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from helpers.adapters import ATTENTION, merge, write_adapter
from helpers.buckets import serve_buckets
from helpers.engines import Generation, compare
from helpers.plain import write_dequantized
from quantserve_squeezellm.quantizer import SqueezeLLM

from .server import DEMO, KEY, Server, model, serve, until

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]

PROMPTS = [[1, 17, 33, 42, 99], [2, 40, 201, 7, 8, 250, 64, 3, 129], list(range(100, 120))]
CLEAR, CLOSE = 0.3, 0.5
"""Of bfloat16 against float32: logits of tokens that must be equal, and log-probabilities."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, and the model's weights in float32 as they are and with each merged."""
    made = tmp_path_factory.mktemp("adapters")
    write_adapter(made / "bucket" / "loras" / "all", DEMO / "checkpoint", size=0.35, seed=1)
    write_adapter(made / "some", DEMO / "checkpoint", rank=4, targets=ATTENTION[:3], size=0.5, use_rslora=True, seed=2)
    write_dequantized(DEMO / "squeezellm", made / "base", SqueezeLLM)
    merge(made / "base", made / "bucket" / "loras" / "all", made / "merged-all")
    merge(made / "base", made / "some", made / "merged-some")
    shutil.copytree(DEMO / "squeezellm", made / "bucket" / "models" / "demo")
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serve_buckets() as store:
        store.folders["private"] = folder / "bucket"
        entry = model(
            "demo",
            "s3://private/models/demo",
            adapters=[
                {"name": "org/all", "source": "s3://private/loras/all"},
                {"name": "some", "source": "some"},
            ],
        )
        (folder / "app.yaml").write_text(yaml.safe_dump({"models": [entry], "http": {"access_log": "access.log"}}))
        running = serve(
            folder / "app.yaml",
            AWS_ENDPOINT_URL=store.endpoint,
            AWS_ACCESS_KEY_ID="AKIA",
            AWS_SECRET_ACCESS_KEY="not-shown",
            XDG_CACHE_HOME=str(folder / "cache"),
            QUANTSERVE_API_KEYS=KEY,
        )
        try:
            running.ready().key = KEY
            yield running
        finally:
            running.stop()


def test_files_are_downloaded_before_the_start(server: Server, folder: Path) -> None:
    lines = [line for line in server.lines if line.startswith("Downloading s3://private/")]
    assert len(lines) == 2
    weights = list((folder / "cache" / "quantserve" / "buckets").rglob("*.safetensors"))
    assert {path.name for path in weights} == {"model.safetensors", "adapter_model.safetensors"}
    assert "not-shown" not in server.output


def test_adapters_are_models_with_a_parent(server: Server) -> None:
    listed = server.request("GET", "/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in listed] == [("demo", None), ("org/all", "demo"), ("some", "demo")]
    card = server.request("GET", "/v1/models/org/all").json()
    assert (card["id"], card["metadata"]["method"]) == ("org/all", "squeezellm")
    unknown = server.request("POST", "/v1/completions", {"model": "org/al", "prompt": "x"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert "Did you mean `org/all`?" in unknown.json()["error"]["message"]


@pytest.mark.parametrize(("name", "merged"), [("demo", "base"), ("org/all", "merged-all"), ("some", "merged-some")])
def test_tokens_are_those_of_merged_weights(server: Server, folder: Path, name: str, merged: str) -> None:
    made = []
    for prompt in PROMPTS:
        body = {"model": name, "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
        answer = server.request("POST", "/v1/completions", {**body, "logprobs": 0, "return_token_ids": True}).json()
        choice = answer["choices"][0]
        assert answer["model"] == name
        made.append(Generation(prompt, choice["token_ids"], choice["logprobs"]["token_logprobs"]))
    compare(folder / merged, made, clear=CLEAR, close=CLOSE)
    with pytest.raises(AssertionError):  # the adapters differ from each other and from the model
        compare(folder / ("merged-some" if name == "demo" else "base"), made, clear=CLEAR, close=CLOSE)


def test_chat_through_the_models_route_names_the_adapter(server: Server, folder: Path) -> None:
    client: openai.OpenAI = server.client("/demo")
    said = client.chat.completions.create(
        model="some", messages=[{"role": "user", "content": "What is a method?"}], max_tokens=4, stream=True
    )
    assert {chunk.model for chunk in said} == {"some"}
    metrics = server.request("GET", "/metrics").text
    assert re.search(r'^quantserve_requests_total\{[^}]*model="demo"', metrics, re.MULTILINE)
    assert not re.search(r'^quantserve_requests_total\{[^}]*model="some"', metrics, re.MULTILINE)
    until(lambda: of_adapter(folder / "access.log", "some"))  # a thread writes the log
    assert {line["model"] for line in of_adapter(folder / "access.log", "some")} == {"demo"}


def of_adapter(log: Path, name: str) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in every if line.get("adapter") == name]
