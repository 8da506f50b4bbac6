"""`quantserve serve --detach`, `status`, `query` and `stop` with a real model."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from quantserve.system.servers import start_ticks

from .server import BIN, HANGS_S, START_S, free_port, model

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]


def quantserve(*arguments: str, seconds: float = HANGS_S) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "quantserve"), *arguments], capture_output=True, text=True, timeout=seconds, check=False
    )


@pytest.fixture(autouse=True)
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("QUANTSERVE_API_KEYS", raising=False)
    yield
    quantserve("stop", "--all", "--now")


def test_a_server_in_the_background(demo: Path, tmp_path: Path) -> None:
    config = tmp_path / "app.yaml"
    config.write_text(yaml.safe_dump({"models": [model("demo-fp16", demo / "checkpoint")]}))
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    started = quantserve("serve", str(config), "--detach", "--port", str(port), seconds=START_S)
    assert started.returncode == 0, started.stdout + started.stderr
    assert "quantserve stop --pid" in started.stdout
    (shown,) = json.loads(quantserve("status", "--json").stdout)
    assert (shown["url"], shown["state"], shown["sources"]) == (url, "ready", [str(config)])
    assert shown["models"] == [{"id": "demo-fp16", "state": "ready"}]
    asked = quantserve("query", "--url", url, "What does str.join do?", "--max-tokens", "8", "--json")
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["tokens_out"] == 8

    second = quantserve("serve", str(config), "--detach", "--port", str(port), seconds=START_S)
    assert second.returncode == 4
    assert f"port {port} on 127.0.0.1 is already in use" in second.stdout
    assert "ended with exit code 4 before it was ready" in second.stderr

    stopped = quantserve("stop", "--url", url)
    assert stopped.returncode == 0, stopped.stderr
    assert json.loads(quantserve("status", "--json").stdout) == []
    assert start_ticks(shown["pid"]) is None  # it is gone, or a zombie where process 1 reaps nobody
    assert "Stopped in" in Path(shown["log"]).read_text()
