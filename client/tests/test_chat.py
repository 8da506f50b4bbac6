"""`quantserve chat` in a pipe and in a terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantserve.cli.main import run

from .stand_in import StandIn, streamed
from .terminal import Terminal


def remembers(said: str, body: dict[str, Any]) -> str:
    """All turns so far."""
    return " | ".join(f"{message['role']}: {message['content']}" for message in body["messages"])


@pytest.fixture(scope="module")
def server() -> Iterator[StandIn]:
    with StandIn({"m": remembers}) as one:
        yield one


def chat(server: StandIn, lines: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return run(["chat", "m", "--url", server.url, *options])


def test_turns_in_a_pipe(server: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(server, "one\n\ntwo\\\nlines\n/reset\nthree\n/quit\nnever\n", monkeypatch, "--system", "S") == 0
    first, second, third = capsys.readouterr().out.replace("two\nlines", "two/lines").splitlines()
    assert first == "system: S | user: one"
    assert second == f"system: S | user: one | assistant: {first} | user: two/lines"
    assert third == "system: S | user: three"


def test_the_system_prompt_changes_and_the_conversation_is_saved(
    server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "chat.json", tmp_path / "chat.md", tmp_path / "no" / "chat.json"]
    lines = (
        "a\n/system T\nb\n" + "".join(f"/save {path}\n" for path in (*files, files[0])) + "/save\n/jump\n/system\nc\n"
    )
    assert chat(server, lines, monkeypatch) == 0
    saved = json.loads(files[0].read_text())
    assert saved["model"] == "m"
    assert saved["messages"][:2] == [{"role": "system", "content": "T"}, {"role": "user", "content": "b"}]
    assert "**user**\n\nb" in files[1].read_text()
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == "user: c"
    for said in ("No such file", "exists and is not replaced", "/save needs", "/jump is no command"):
        assert said in shown.err


def test_a_failure_in_a_pipe_is_the_exit_code(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("x\n"))
    assert run(["chat", "other", "--url", server.url]) == 2
    assert "unknown model 'other' (known: m)" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("x\n"))
    assert run(["chat", "m", "--url", "http://127.0.0.1:9"]) == 4


def test_a_line_that_is_not_utf_8_is_left_out(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\nnext\n"), encoding="utf-8"))
    assert run(["chat", "m", "--url", server.url]) == 0
    shown = capsys.readouterr()
    assert shown.out == "user: next\n"
    assert "not UTF-8" in shown.err


def test_an_interactive_chat() -> None:
    def reply(said: str, body: dict[str, Any]) -> Any:
        return streamed("endless " * 2000, 0.05) if said == "long" else remembers(said, body).replace("endless ", "e")

    with StandIn({"m": reply}) as server, Terminal("chat", "--url", server.url, "--stats") as terminal:
        terminal.wait_for(r"m at http.*\n> ")
        terminal.type("first\r")
        terminal.wait_for(r"user: first\nTTFT .*\n> ")
        terminal.type("long\r")
        terminal.wait_for(r"endless endless")
        terminal.type("\x03")
        terminal.wait_for(r"stopped\n> ")
        terminal.type("again\r")
        shown = terminal.wait_for(r"user: again\n")
        assert "user: long | assistant: ee" in shown  # what had come stays in the conversation
        terminal.wait_for(r"> ")
        terminal.type("half")
        terminal.wait_for(r"half")
        terminal.interrupt(r"Ctrl-D ends the chat\n> ")
        terminal.type("\x04")
        assert terminal.end() == 0
    assert "Traceback" not in terminal.screen
