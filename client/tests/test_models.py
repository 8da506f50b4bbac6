"""`quantserve models` of this project's server and of others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench.tests.fake_server import FakeServer, whole
from quantserve.cli.main import run

from .stand_in import StandIn

PAGE = Path(__file__).parents[2] / "docs" / "explorer.md"


def status() -> Any:
    """The example of ``/status`` in the documentation."""
    return next(json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
                if '"models"' in block and '"replicas"' in block)  # fmt: skip


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("QUANTSERVE_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_our_server(capsys: pytest.CaptureFixture[str]) -> None:
    with StandIn({}, others={"/status": status()}) as server:
        assert run(["models", "--url", server.url]) == 0
        shown = capsys.readouterr().out
        (row,) = (line for line in shown.splitlines() if "demo-awq" in line and "│" in line)
        for cell in ("awq 4", "ready", "2 + 0 queued", "512", "93.1 / 71.2", "9.1 / 7.4", "104 / 121", "1.012x"):
            assert cell in row
        assert "kernel-fallback" in shown
        assert run(["models", "--url", server.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == status()


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_nothing_is_cut_in_a_narrow_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with StandIn({}, others={"/status": status()}) as server:
        assert run(["models", "--url", server.url]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]  # the heading has the address
    shown = "\n".join(line for line in lines if "kernel-fallback" not in line)
    for cell in ("demo-awq", "awq 4", "ready", "93.1 / 71.2", "9.1 / 7.4", "104 / 121", "1.012x", "perplexity"):
        assert cell in shown
    table = [line for line in lines if not line.startswith("  ")] if columns == 120 else lines[:10]
    assert max(map(len, table)) <= columns


def test_another_server(capsys: pytest.CaptureFixture[str]) -> None:
    with StandIn({"llama\x1b[2J": lambda said, body: ""}) as server:
        assert run(["models", "--url", server.url]) == 0
        shown = capsys.readouterr().out
        assert "llama\\x1b[2J │ tests" in shown
        assert run(["models", "--url", server.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"][0]["owned_by"] == "tests"


def test_a_status_of_another_form_does_no_harm(capsys: pytest.CaptureFixture[str]) -> None:
    odd = {"models": [{"id": 5, "replicas": 3, "findings": "x", "expected": [], "bits": "4", "state": None}, "text"]}
    with StandIn({}, others={"/status": odd}) as server:
        assert run(["models", "--url", server.url]) == 0
    assert "│ 5 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        (whole(404, {"detail": "Not Found"}), 2, "no OpenAI-compatible API: GET /v1/models returned status 404"),
        (whole(200, {"data": "text"}), 2, "no OpenAI-compatible API"),
        (whole(401, {"error": {"message": "no"}}), 2, "refused the API key"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n<html>...", 2, "no OpenAI-compatible API"),
        (b"nonsense\r\n\r\n", 4, "broke the connection"),
    ],
)
def test_servers_of_another_kind(answer: bytes, code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(lambda number, body: [answer, "close"]) as server:
        assert run(["models", "--url", server.url]) == code
    assert message in (shown := capsys.readouterr().err)
    assert "fix: " in shown
