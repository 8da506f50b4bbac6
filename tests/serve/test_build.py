"""`serve run` of `quantserve.serve.app:build`, as `serve deploy` and KubeRay run it."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from quantserve.errors import ConfigError, FindingsError, UsageError
from quantserve.serve.app import build

from .server import BIN, Server, free_port, model, until


@pytest.mark.ray
@pytest.mark.vllm
def test_serve_run_with_two_models(demo: Path, tmp_path: Path) -> None:
    port = free_port()
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "quantserve",
                "route_prefix": "/",
                "import_path": "quantserve.serve.app:build",
                "args": {
                    "models": [model("org/fp16", demo / "checkpoint"), model("awq", demo / "awq")],
                    "target": "cpu",
                },
            }
        ],
    }
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    # Ray gives its workers a niceness of 15, with which they hardly run beside other tests.
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": "local", "RAY_worker_niceness": "0"}
    running = Server([str(BIN / "serve"), "run", str(path)], **environment)
    try:
        running.base = f"http://127.0.0.1:{port}"
        until(lambda: running.request("GET", "/health").status_code == 200, 300)
        assert [card.id for card in running.client().models.list().data] == ["org/fp16", "awq"]
        for name in ("org/fp16", "awq"):
            for prefix in ("", "/" + name.replace("/", "--")):
                answer = running.client(prefix).completions.create(model=name, prompt="Return", max_tokens=3)
                assert (answer.model, bool(answer.choices[0].text)) == (name, True)
        events = list(running.client().completions.create(model="awq", prompt="R", max_tokens=5, stream=True))
        assert len(events) >= 2
        assert running.request("POST", "/v1/completions", {"model": "x"}).json()["error"]["code"] == "model_not_found"
    finally:
        running.stop(signal.SIGINT, 90)


def test_build_refuses_what_check_refuses(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(FindingsError, match=r"[a-z]+-[a-z]+.*\n.*: "):
        build({"models": [model("wrong", demo / "awq", engine_kwargs={"quantization": "squeezellm"})], "target": "cpu"})
    with pytest.raises(ConfigError, match="no model"):
        build({"models": []})
    with pytest.raises(ConfigError, match="serve args"):
        build({"models": [], "modles": []})
    with pytest.raises(ConfigError, match="target must be text"):
        build({"models": [], "target": 5})
    with pytest.raises(UsageError, match="unknown target"):
        build({"models": [model("m", demo / "awq")], "target": "abacus"})
    with pytest.raises(ConfigError, match="reserved"):
        build({"models": [model("v1", demo / "awq")], "target": "cpu"})


def test_serve_stays_out_of_the_light_commands() -> None:
    """list, check and plan import neither the serving package nor what it needs."""
    code = (
        "import sys, quantserve.cli.main, quantserve.cli.serve_command, quantserve.planning.plan\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('ray', 'vllm', 'torch', 'starlette')"
        " or name.startswith('quantserve.serve')])"
    )
    done = subprocess.run([BIN / "python", "-c", code], capture_output=True, text=True, timeout=300, env={**os.environ})
    assert done.stdout.strip() == "[]", done.stderr
