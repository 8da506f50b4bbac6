"""`quantserve query` against a server with OpenAI's API."""

from __future__ import annotations

import io
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.tests.fake_server import END, FakeServer, Step, chunk, delta, event, head, whole
from quantserve.cli.main import run

from .stand_in import StandIn, error, jsonl, streamed
from .terminal import Terminal, plain


@pytest.fixture(scope="module")
def server() -> Iterator[StandIn]:
    models = {
        "parrot": lambda said, body: f"You said {said}",
        "loud": lambda said, body: said.upper(),
        "rude": lambda said, body: "\x1b[2J\x1b]0;title\x07gone \u202eback\ttab",
        "fields": lambda said, body: json.dumps({key: body[key] for key in sorted(body)}),
    }
    with StandIn(models) as one:
        yield one


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QUANTSERVE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_one_model_and_one_prompt_print_the_answer_alone(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["query", "--url", server.url, "--model", "parrot", "good day"]) == 0
    assert capsys.readouterr().out == "You said good day\n"


def test_several_are_blocks_in_order(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["query", "--url", f"{server.url}/v1", "--model", "parrot", "--model", "loud", "a", "b", "--stats"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "> a\n== parrot\nYou said a\n== loud\nA\n> b\n== parrot\nYou said b\n== loud\nB\n"
    assert shown.err.count("2 of 2") == 2
    assert "TTFT" in shown.err


def test_stats_of_our_server_have_the_expected_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one request alone; an adapter has those of its model."""
    monkeypatch.setenv("COLUMNS", "200")
    alone = {"ttft_ms": 31.0, "tpot_ms": 6.2, "tokens_per_s": 151.0}
    models = [
        {"id": "base", "expected": {"ttft_ms": 93.1, "alone": alone}, "adapters": ["lora"]},
        {"id": "loaded", "expected": {"ttft_ms": 77.0, "alone": None}, "adapters": []},
        {"id": "new", "expected": None, "adapters": []},
        {"id": "odd", "expected": {"ttft_ms": "1", "alone": []}, "adapters": 5},
    ]
    names = ["base", "lora", "loaded", "new", "odd"]
    replies = dict.fromkeys(names, lambda said, body: "a b c")
    with StandIn(replies, others={"/status": {"models": models}}) as server:
        chosen = [argument for name in names for argument in ("--model", name)]
        assert run(["query", "--url", server.url, *chosen, "x", "--stats"]) == 0
    shown = capsys.readouterr().err
    assert "expected of one request alone / measured" in shown
    cells = [[cell.strip() for cell in line.split("│")[1:5]] for line in shown.splitlines() if line.startswith("│")]
    expected = {name: [figure.split(" / ")[0] for figure in figures] for name, *figures in cells}
    assert expected["base"] == expected["lora"] == ["31", "6.2", "151"]
    assert expected["loaded"] == ["77", "-", "-"]
    assert expected["new"] == expected["odd"] == ["-", "-", "-"]
    assert all(re.search(r"/ [\d.,]+$", figure) for _, *figures in cells for figure in figures)


def test_stats_of_another_server_are_the_measured_figures(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["query", "--url", server.url, "--model", "parrot", "x", "--stats"]) == 0
    assert " / " not in capsys.readouterr().err.partition("\n")[2]


def test_answers_that_stream_at_once_are_not_mixed(capsys: pytest.CaptureFixture[str]) -> None:
    models = {name: lambda said, body: streamed(" ".join([body["model"]] * 20), 0.01) for name in ("one", "two")}
    with StandIn(models) as server:
        assert run(["query", "--url", server.url, "--model", "one", "--model", "two", "x"]) == 0
        assert server.most_in_flight == 2
    assert capsys.readouterr().out == f"== one\n{' '.join(['one'] * 20)}\n== two\n{' '.join(['two'] * 20)}\n"


def test_json_lines(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["query", "--url", server.url, "--model", "parrot", "--model", "rude", "a b", "--json"]) == 0
    rows = {row["model"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["parrot"]["text"] == "You said a b"
    assert rows["rude"]["text"].startswith("\x1b[2J")  # as it came; the escape is JSON's
    assert (rows["parrot"]["tokens_in"], rows["parrot"]["tokens_out"]) == (7, 4)
    assert rows["parrot"]["ttft_ms"] <= rows["parrot"]["e2e_ms"]
    assert rows["parrot"]["finish_reason"] == "stop"
    assert rows["parrot"]["error"] is None


def test_text_cannot_command_the_terminal(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["query", "--url", server.url, "--model", "rude", "x"]) == 0
    assert capsys.readouterr().out == "\\x1b[2J\\x1b]0;title\\x07gone \\u202eback\ttab\n"


def test_parameters_reach_the_server(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-tokens", "9", "--temperature", "0.5", "--seed", "3", "--system", "Be brief."]
    assert run(["query", "--url", server.url, "--model", "fields", "hi", *options]) == 0
    sent = json.loads(capsys.readouterr().out)
    assert (sent["max_tokens"], sent["temperature"], sent["seed"]) == (9, 0.5, 3)
    assert sent["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


def test_a_completion_has_no_chat(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["query", "--url", server.url, "--model", "fields", "2 + 2 =", "--completion"]) == 0
    assert '"prompt": "2 + 2 ="' in capsys.readouterr().out
    assert server.exchanges[-1].head.startswith("POST /v1/completions ")


def test_prompts_of_files_and_standard_input(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text("\ufefffirst\n\nsecond\r\n")
    (tmp_path / "p.jsonl").write_text(
        jsonl({"prompt": "third"}, {"messages": [{"role": "user", "content": "fourth"}]}, "fifth")
    )
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"two\nlines\n")))
    files = ["--file", str(tmp_path / "p.txt"), "--file", str(tmp_path / "p.jsonl")]
    assert run(["query", "--url", server.url, "--model", "loud", "-", *files, "--json"]) == 0
    said = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert said == ["TWO\nLINES", "FIRST", "SECOND", "THIRD", "FOURTH", "FIFTH"]


def test_the_only_model_needs_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    with StandIn({"single": lambda said, body: "here"}) as server:
        assert run(["query", "--url", server.url, "x"]) == 0
    assert capsys.readouterr().out == "here\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "has no prompt"),
        ("p.txt", b"\n \n", "has no prompt"),
        ("p.txt", b"good\n\xff\xfe\n", "p.txt:2: not UTF-8"),
        ("p.txt", b"x" * (5 << 20), "p.txt:1: a line of more than 4 MiB"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "p.jsonl:2, column 12: not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"text": 1}\n', "p.jsonl:3: neither `prompt` nor `messages`"),
        ("p.jsonl", b'{"prompt": "a", "messages": []}\n', "p.jsonl:1: both"),
        ("p.jsonl", b'{"messages": [{"role": "king"}]}\n', "p.jsonl:1: `messages[0]` needs a `role`"),
        ("p.jsonl", b"[1]\n", "p.jsonl:1: a JSON object is expected"),
        ("p.jsonl", b"[" * 100_000, "p.jsonl:1: not JSON"),
        ("p.jsonl", b'{"prompt": 5}\n', "`prompt` is 5"),
    ],
)
def test_wrong_files_are_refused_with_the_line(
    name: str, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert run(["query", "--model", "m", "--file", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to ask"),
        ([""], "a prompt is empty"),
        (["--file", "/nowhere/p.txt"], "cannot be read: No such file"),
        (["-", "-"], "named twice"),
        (["x", "--completion", "--system", "y"], "--completion takes one text"),
        (["x", "--url", "ftp://host"], "not a valid URL"),
        (["x", "--url", "http://[::1"], "not a valid URL"),
        (["x", "--api-key", "a\nb"], "other than printable ASCII"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["query", "--model", "m", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_several_models_and_no_name_are_listed(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["query", "--url", server.url, "x"]) == 2
    assert "several models: parrot, loud, rude, fields\n  fix: choose with --model" in capsys.readouterr().err


def test_an_unknown_model_is_named_and_the_others_answer(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["query", "--url", server.url, "--model", "parot", "--model", "loud", "x"]) == 2
    shown = capsys.readouterr()
    assert "did you mean 'parrot'?" in shown.err
    assert "X\n" in shown.out


@pytest.mark.parametrize("variable", ["QUANTSERVE_API_KEY", "OPENAI_API_KEY"])
def test_keys(variable: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with StandIn({"m": lambda said, body: "in"}, key="right-key") as server:
        assert run(["query", "--url", server.url, "--model", "m", "x"]) == 2
        assert "none was sent" in capsys.readouterr().err
        monkeypatch.setenv(variable, "wrong-key-17")
        assert run(["query", "--url", server.url, "--model", "m", "x"]) == 2
        shown = capsys.readouterr().err
        assert "refused the API key (status 401)" in shown
        assert "wrong-key-17" not in shown
        monkeypatch.setenv(variable, "right-key")
        assert run(["query", "--url", server.url, "x"]) == 0


BROKEN: list[tuple[list[Step], int, str]] = [
    ([head(), chunk(delta(content="begun ")), "close"], 4, "broke the connection"),
    ([head(), chunk(delta(content="begun ")), "reset"], 4, "lost"),
    ([head(), chunk(delta(content="begun ")), END], 4, "without [DONE]"),
    ([head(), chunk(event(b"{nonsense")), END], 4, "no JSON object"),
    ([head(), chunk(event([1, 2])), END], 4, "no JSON object"),
    ([head(), chunk(event({"choices": [7]})), END], 4, "no JSON object"),
    ([head(), chunk(delta(content=["list"])), END], 4, "no JSON object"),
    ([head(), chunk(delta(content="x") + event({"error": {"message": "no memory", "code": 500}})), END], 4, "memory"),
    ([b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: " + b"x" * (17 << 20), "close"], 4, "16 MiB"),
    ([b"SSH-2.0-OpenSSH_9.6\r\n", "close"], 4, "broke the connection"),
    (["close"], 4, "broke the connection"),
    ([whole(200, [1])], 4, "no JSON object"),
    ([b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>"], 4, "no JSON object"),
    ([b"HTTP/1.1 404 X\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>"], 2, "a web page"),
    ([b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc"], 4, "fix: "),
    ([whole(400, error("too long: 9 > 8", "context_length_exceeded"))], 2, "too long: 9 > 8"),
    ([whole(429, error("queue full", "queue_full"), "Retry-After: 5")], 4, "is busy (status 429): queue full"),
    ([b"HTTP/1.1 501 X\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>"], 4, "fix: correct --url, if"),
    ([whole(500, {"detail": "broken"})], 4, "failed (status 500)"),
    ([whole(307, {}, "Location: https://elsewhere/v1")], 2, "it redirects to https://elsewhere/v1"),
    ([head(), chunk(delta(content="a")), 30.0], 4, "no data for 0.3 s, the limit of --stall\n  fix: raise --stall"),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "code", "message"), BROKEN)
def test_broken_answers_have_a_message_and_a_fix(
    steps: list[Step], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(number: int, body: dict[str, Any]) -> Iterable[Step]:
        return steps

    with FakeServer(script) as server:
        stall = ["--stall", "0.3"] if 30.0 in steps else []
        assert run(["query", "--url", server.url, "--model", "m", "x", *stall]) == code
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert "bug in quantserve" not in shown


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert run(["query", "--url", url, "--model", "m", "x"]) == 4
        assert "connection refused" in (shown := capsys.readouterr().err)
        assert "fix: start the server, or correct --url" in shown
        assert run(["query", "--url", url, "x"]) == 4
    assert run(["query", "--url", "http://host.invalid", "--model", "m", "x"]) == 4
    assert "cannot resolve the host name host.invalid" in capsys.readouterr().err


def test_proxies_of_the_environment(
    server: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with FakeServer(lambda number, body: [whole(403, error("not from here", "denied"))]) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        assert run(["query", "--url", "http://host.invalid", "--model", "m", "x"]) == 2
        assert "not from here" in capsys.readouterr().err
        assert proxy.exchanges[0].head.startswith("POST http://host.invalid/v1/chat/completions ")
        assert run(["query", "--url", server.url, "--model", "parrot", "x"]) == 0  # this machine needs none
    monkeypatch.setenv("HTTP_PROXY", "nonsense://x")
    assert run(["query", "--url", "http://host.invalid", "--model", "m", "x"]) == 2
    assert "the proxy settings of the environment cannot be used" in capsys.readouterr().err


def test_tls_without_tls(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lambda: listener.accept()[0].sendall(b"HTTP/1.1 400 X\r\n\r\n")).start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        assert run(["query", "--url", url, "--model", "m", "x"]) == 4
    assert "write http:// in --url" in capsys.readouterr().err


def test_the_whole_answer_has_a_limit(capsys: pytest.CaptureFixture[str]) -> None:
    with StandIn({"m": lambda said, body: streamed("word " * 1000, 0.05)}) as server:
        assert run(["query", "--url", server.url, "--model", "m", "x", "--timeout", "0.4"]) == 4
    shown = capsys.readouterr()
    assert "within 0.4 s, the limit of --timeout" in shown.err
    assert "word" in shown.out


def test_a_reader_that_leaves_is_no_failure_of_the_server() -> None:
    with StandIn({"m": lambda said, body: streamed("word " * 500, 0.01)}) as server:
        command = [sys.executable, "-m", "quantserve", "query", "--url", server.url, "x"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5) == b"word "
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""
        process.stderr.close()


def test_columns_in_a_terminal() -> None:
    gate = threading.Event()

    def held(said: str, body: dict[str, Any]) -> Iterator[Step]:
        steps = list(streamed(f"{body['model']}-begun {body['model']}-ended"))
        yield from steps[:4]
        while not gate.is_set():
            yield 0.02
        yield from steps[4:]

    with StandIn({"left": held, "right": held}) as server:
        models = ["--model", "left", "--model", "right"]
        with Terminal("query", "--url", server.url, *models, "hi", "--stats") as terminal:
            terminal.wait_for(r"left-begun.*right-begun")  # in one line of the screen, before either has ended
            assert "ended" not in terminal.screen
            gate.set()
            assert terminal.end() == 0
    last = plain(terminal.screen)[plain(terminal.screen).rindex("╭") :]
    assert re.search(r"left-begun left-ended .*right-begun right-ended", last)
    assert "TTFT" in last
    assert terminal.screen.count("\x1b[?25l") == terminal.screen.count("\x1b[?25h") == 1  # the cursor is shown again


def test_columns_lose_no_text() -> None:
    """Long words and wide characters, in a terminal with room for one column."""
    texts = {"long": "x" * 333, "wide": "\u6f22" * 111, "tabs": "\ta\tb"}
    models = dict.fromkeys(texts, lambda said, body: texts[body["model"]])
    names = [argument for name in texts for argument in ("--model", name)]
    with StandIn(models) as server, Terminal("query", "--url", server.url, *names, "hi", columns=50) as terminal:
        assert terminal.end() == 0
    last = plain(terminal.screen[terminal.screen.rindex("\x1b[2K") :])
    assert (last.count("x"), last.count("\u6f22")) == (333, 111)


def test_ctrl_c_ends_cleanly() -> None:
    models = {name: lambda said, body: streamed("on " * 5000, 0.05) for name in ("a", "b")}
    names = ["--model", "a", "--model", "b"]
    with StandIn(models) as server, Terminal("query", "--url", server.url, *names, "hi") as terminal:
        terminal.wait_for(r"on on")
        terminal.type("\x03")
        assert terminal.end() == 130
    assert plain(terminal.screen).rstrip().endswith("interrupted")
    assert "Traceback" not in terminal.screen
    assert terminal.screen.rstrip().count("\x1b[?25h") == 1
