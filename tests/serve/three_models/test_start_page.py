"""What docs/start.md tells a newcomer to run, run against the server of this folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..server import KEY, Server
from .conftest import MODELS

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

ROOT = Path(__file__).parents[3]
ADDRESS = "http://127.0.0.1:8000"
PAGE = (ROOT / "docs" / "start.md").read_text()


def block(language: str, contains: str) -> str:
    (found,) = (text for text in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if contains in text)
    return found


def run(command: list[str], server: Server | None = None) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "QUANTSERVE_API_KEY": KEY, "COLUMNS": "120"}
    if server:
        command = [
            argument.replace(ADDRESS, server.base).replace('api_key="none"', f'api_key="{KEY}"') for argument in command
        ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_check() -> None:
    shown = run(["bash", "-c", block("sh", "quantserve check models/demo.yaml")])
    assert shown.count(" ok ") == 3


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: Server) -> None:
    command = block("sh", "curl").replace("-H", f"-H 'Authorization: Bearer {KEY}' -H", 1)
    assert '"role":"assistant"' in run(["bash", "-c", command], server)


def test_query(server: Server) -> None:
    command = (
        block("sh", "quantserve query").replace("query", f"query --url {ADDRESS}").replace("demo-awq", "org/demo-awq")
    )
    assert re.findall(r"^== (\S+)", run(["bash", "-c", command], server), re.MULTILINE) == list(MODELS)


def test_openais_client(server: Server) -> None:
    shown = run([sys.executable, "-c", block("python", "OpenAI(")], server)
    assert re.findall(r"^(\S+) -> ", shown, re.MULTILINE) == list(MODELS)


def test_bench(server: Server, tmp_path: Path) -> None:
    command = block("sh", "quantserve bench").replace("build/bench", str(tmp_path))
    assert "TTFT" in run(["bash", "-c", command], server)
    assert list(tmp_path.rglob("*.json"))
