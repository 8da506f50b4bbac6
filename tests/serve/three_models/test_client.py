"""The client's commands against three real models: query, models, chat, evaluate."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from quantserve.cli.main import run

from ..server import KEY, Server
from .conftest import MODELS

pytestmark = [pytest.mark.ray, pytest.mark.vllm]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTSERVE_API_KEY", KEY)
    monkeypatch.setenv("COLUMNS", "200")


def test_query_asks_all_at_once(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    names = [argument for name in MODELS for argument in ("--model", name)]
    options = ["--url", server.base, "--max-tokens", "6", "--temperature", "0", "--json", "--stats"]
    assert run(["query", "What does str.join do?", *names, *options]) == 0
    shown = capsys.readouterr()
    rows = {row["model"]: row for row in map(json.loads, shown.out.splitlines())}
    assert set(rows) == set(MODELS)
    assert rows["demo-fp16"]["tokens_out"] == 6
    assert rows["demo-fp16"]["tpot_ms"] > 0
    assert rows["demo-fp16"]["ttft_ms"] + 5 * rows["demo-fp16"]["tpot_ms"] <= rows["demo-fp16"]["e2e_ms"] * 1.001
    assert shown.err.count("1 of 1") == 3


def test_a_completion_continues_the_text(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--url", server.base, "--model", "demo-fp16", "--completion", "--max-tokens", "4", "--temperature", "0"]
    assert run(["query", "str.join", *options]) == 0
    body = {"model": "demo-fp16", "prompt": "str.join", "max_tokens": 4, "temperature": 0}
    expected = server.request("POST", "/v1/completions", body).json()["choices"][0]["text"]
    assert capsys.readouterr().out == expected.removesuffix("\n") + "\n"


def test_wrong_keys_models_and_values(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["query", "x", "--url", server.base, "--model", "demo-fp61"]) == 2
    assert "did you mean 'demo-fp16'?" in capsys.readouterr().err
    assert run(["query", "x " * 3000, "--url", server.base, "--model", "demo-fp16"]) == 2
    assert "refused the request (status 400)" in capsys.readouterr().err
    monkeypatch.setenv("QUANTSERVE_API_KEY", "wrong-key-0123")
    for command in (["query", "x", "--model", "demo-fp16"], ["models"], ["chat"], ["evaluate"]):
        assert run([*command, "--url", server.base]) == 2
        assert "refused the API key (status 401)" in capsys.readouterr().err


def test_models_are_those_of_the_server(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "--url", server.base]) == 0
    table = capsys.readouterr().out
    for name, method in zip(MODELS, ("fp16", "awq", "squeezellm"), strict=True):
        (row,) = (line for line in table.splitlines() if f"│ {name} " in line)
        assert method in row
        assert "ready" in row
    assert run(["models", "--url", server.base, "--json"]) == 0
    assert [model["id"] for model in json.loads(capsys.readouterr().out)["models"]] == list(MODELS)


def test_a_chat_in_a_pipe(server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What does str.join do?\nAnd str.split?\n"))
    assert run(["chat", "demo-fp16", "--url", server.base, "--max-tokens", "5", "--temperature", "0"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_evaluate_with_a_judge(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"prompt": "What does str.join do?", "reference": "join", "match": "contains"}\n')
    options = ["--model", "demo-fp16", "--model", "org/demo-awq", "--judge", "demo-fp16", "--max-tokens", "8", "--json"]
    assert run(["evaluate", str(file), "--url", server.base, *options, "--out", str(tmp_path / "out")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["scored"] for row in report["models"]] == [1, 1]
    (found,) = report["comparisons"]
    assert found["wins"] + found["losses"] + found["ties"] + found["unclear"] == 1
    assert (tmp_path / "out" / "report.md").is_file()
