"""`quantserve evaluate` against models that know some answers, and judges of different characters."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.tests.fake_server import Step, whole
from quantserve.cli.main import run
from quantserve_client.questions import BUILT_IN, read

from .stand_in import StandIn, answer, error, jsonl
from .terminal import Terminal

QUESTIONS = [
    {"id": "sum", "prompt": "1 + 1?", "reference": 2, "category": "math"},
    {"id": "town", "prompt": "Capital of France?", "reference": ["Paris"], "match": "contains", "category": "facts"},
    {"prompt": "Say yes.", "reference": "yes"},
    {"prompt": "Digits?", "reference": r"^\d+$", "match": "regex"},
]
RIGHT = {"1 + 1?": "It is 2.", "Capital of France?": "It is Paris.", "Say yes.": "Yes!", "Digits?": "123"}


def good(said: str, body: dict[str, Any]) -> str:
    return RIGHT[said]


def bad(said: str, body: dict[str, Any]) -> str:
    return "Yes!" if said == "Say yes." else "I do not know | 7"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("QUANTSERVE_API_KEY", "OPENAI_API_KEY", "QUANTSERVE_JUDGE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "questions.jsonl"
    path.write_text(jsonl(*QUESTIONS))
    return path


def test_accuracy_in_every_form(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with StandIn({"good": good, "bad": bad}) as server:
        assert run(["evaluate", str(file), "--url", server.url, "--out", str(out)]) == 0
        assert {body["temperature"] for body in server.asked} == {0.0}
        shown = capsys.readouterr().out
        assert re.search(r"good +│ 100.0 % +│ 51.0 to 100.0 % +│ 4 +│ 4 +│ 0", shown)  # Wilson of 4 in 4
        assert re.search(r"bad +│ 25.0 %", shown)
        assert re.search(r"bad - good +│ -75.0 %", shown)
        asked = len(server.asked)
        assert run(["evaluate", str(file), "--url", server.url, "--out", str(out), "--json"]) == 0
        assert len(server.asked) == asked == 8  # all answers were kept
    shown = capsys.readouterr()
    assert "8 answers are there already" in shown.err
    report = json.loads(shown.out)
    assert report["models"][0]["categories"]["math"]["value"] == 1
    assert [row["right"] for row in report["models"]] == [4, 1]
    (pair,) = report["pairs"]
    assert (pair["only_first"], pair["only_second"], pair["p"]) == (0, 3, 0.25)
    assert json.loads((out / "results.json").read_text())["models"] == report["models"]
    page = (out / "report.md").read_text()
    assert "I do not know \\| 7" in page
    assert "evaluate.svg" in page
    assert "temperature 0.0" in page
    assert (out / "evaluate.svg").read_text().startswith("<svg")
    assert not list(out.glob(".*"))


def test_an_interrupted_run_goes_on(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    failing: set[str] = {"Say yes.", "Digits?"}

    def shaky(said: str, body: dict[str, Any]) -> Any:
        return [whole(500, error("down", "down"))] if said in failing else good(said, body)

    with StandIn({"m": shaky}) as server:
        assert run(["evaluate", str(file), "--url", server.url, "--out", str(out)]) == 4
        assert "failed (status 500): down" in capsys.readouterr().err
        kept = out / "answers.jsonl"
        lines = kept.read_text().splitlines()
        assert len(lines) == 2
        kept.write_text(lines[0] + "\n" + lines[1][:20])  # as a crash leaves it
        failing.clear()
        server.asked.clear()
        assert run(["evaluate", str(file), "--url", server.url, "--out", str(out)]) == 0
        assert len(server.asked) == 3
        assert "the last line was cut off" in capsys.readouterr().err
        file.write_text(jsonl(*QUESTIONS[:3], {**QUESTIONS[3], "prompt": "1 + 1?"}))
        server.asked.clear()
        assert run(["evaluate", str(file), "--url", server.url, "--out", str(out), "--seed", "1"]) == 0
        assert len(server.asked) == 3  # another parameter, and two questions of one text


def test_a_busy_server_is_asked_again(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused: dict[str, int] = {}

    def busy(said: str, body: dict[str, Any]) -> Any:
        refused[said] = refused.get(said, 0) + 1
        return [whole(429, error("full", "queue_full"), "Retry-After: 0.05")] if refused[said] < 3 else good(said, body)

    with StandIn({"m": busy}) as server:
        assert run(["evaluate", str(file), "--url", server.url, "-c", "2"]) == 0
        assert server.most_in_flight <= 2
    assert set(refused.values()) == {3}


def test_a_server_that_goes_away_leaves_what_was_answered(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StandIn({"m": lambda said, body: good(said, body) if said == "1 + 1?" else ["reset"]}) as server:
        assert run(["evaluate", str(file), "--url", server.url, "-c", "1"]) == 4
    shown = capsys.readouterr()
    assert re.search(r"m +│ 100.0 % +│ .* │ 1 +│ 1 +│ 3", shown.out)
    assert "the connection was lost" in shown.err


def fair(said: str, body: dict[str, Any]) -> str:
    """A judge that prefers an answer without "know"."""
    first, second = re.findall(r"\[Answer \d\]\n\n(.*?)(?=\n\n\[)", said, re.DOTALL)
    if ("know" in first) == ("know" in second):
        return "Verdict: tie"
    return "Verdict: 2" if "know" in first else "Verdict: 1"


@pytest.mark.parametrize(
    ("judge", "expected"),
    [
        (fair, {"wins": 3, "losses": 0, "ties": 1, "contradictions": 0, "unclear": 0}),
        (lambda said, body: "Verdict: 1", {"wins": 0, "losses": 0, "ties": 4, "contradictions": 4, "unclear": 0}),
        (lambda said, body: "I like both.", {"wins": 0, "losses": 0, "ties": 0, "contradictions": 0, "unclear": 4}),
    ],
)
def test_judges(judge: Any, expected: dict[str, int], file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StandIn({"good": good, "bad": bad}) as server, StandIn({"judge": judge}, key="judges") as other:
        judged = ["--judge", "judge", "--judge-url", other.url, "--judge-api-key", "judges"]
        assert run(["evaluate", str(file), "--url", server.url, *judged, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["comparisons"]
    assert {name: found[name] for name in expected} == expected
    if judge is not fair and expected["contradictions"]:
        assert found["first_place"]["value"] == 1


def test_a_judge_needs_no_references_and_the_key_stays_with_its_server(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(jsonl({"prompt": "1 + 1?"}))
    with StandIn({"good": good, "bad": bad}, key="secret") as server, StandIn({"judge": fair}) as other:
        options = ["--api-key", "secret", "--judge", "judge", "--judge-url", other.url]
        assert run(["evaluate", str(file), "--url", server.url, *options, "--out", str(tmp_path / "out")]) == 0
        assert not [one for one in other.exchanges if "secret" in one.head]
    shown = capsys.readouterr().out
    assert "Accuracy" not in shown
    assert re.search(r"good +│ bad +│ 100.0 %", shown)


def test_the_built_in_questions_can_be_answered() -> None:
    """Every question has a reference that its own rule accepts; regular expressions are shown an example."""
    from quantserve_client.scoring import is_right

    examples = ("yes", "1, 2, 3, 4, 5", '{"a": 1}', "blue blue blue")
    questions = read(str(BUILT_IN), None, judged=False)
    assert len(questions) == 40
    for one in questions:
        tried = examples if one.match == "regex" else one.references
        assert any(is_right(text, one.match, one.references) for text in tried), one.id
        assert not is_right("I cannot say.", one.match, one.references), one.id


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "x"}, "q.jsonl:2: no `reference`"),
        ({"prompt": "x", "reference": {"a": 1}}, "q.jsonl:2: `reference` is"),
        ({"prompt": "x", "reference": True}, "q.jsonl:2: `reference` is true"),
        ({"prompt": "x", "reference": "y", "match": "fuzzy"}, "q.jsonl:2: unknown match 'fuzzy'"),
        ({"prompt": "x", "reference": "(", "match": "regex"}, "q.jsonl:2: `reference` is no regular expression"),
        ({"prompt": "x", "reference": "two", "match": "numeric"}, "q.jsonl:2: `reference` is 'two', a number"),
        ({"prompt": "x", "reference": "!?"}, "q.jsonl:2: `reference` has no letter"),
        ({"prompt": "x", "reference": "y", "tolerance": -1}, "q.jsonl:2: `tolerance` is -1"),
        ({"prompt": "x", "reference": "y", "refrence": "z"}, "q.jsonl:2: unknown key 'refrence'; did you mean"),
        ({"prompt": "x", "reference": "y", "id": "1"}, "q.jsonl:2: the id '1' is there twice"),
    ],
)
def test_wrong_questions_are_named(
    line: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(jsonl({"prompt": "x", "reference": "y"}, line))
    assert run(["evaluate", str(path), "--model", "m"]) == 2
    assert message in capsys.readouterr().err


def test_other_mistakes(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with StandIn({"good": good, "bad": bad}) as server:
        url = ["--url", server.url]
        for arguments, code, message in (
            ([str(tmp_path / "empty.jsonl"), *url], 2, "has no question"),
            ([str(tmp_path / "none.jsonl"), *url], 2, "cannot be read"),
            ([str(file), *url, "--model", "godo"], 2, "did you mean 'good'?"),
            ([str(file), *url, "--model", "good", "--judge", "bad"], 2, "a judge compares two models or more"),
            ([str(file), *url, "--judge-url", server.url], 2, "name the judge's model with --judge"),
            ([str(file), *url, "--judge", "nobody"], 2, "unknown model 'nobody'"),
            ([str(file), *url, "--out", str(file)], 2, "--out"),
            ([str(file), "--url", "http://127.0.0.1:9"], 4, "connection refused"),
        ):
            assert run(["evaluate", *arguments]) == code, arguments
            assert message in capsys.readouterr().err


def test_progress_in_a_terminal(file: Path) -> None:
    def slow(said: str, body: dict[str, Any]) -> Iterator[Step]:
        yield 0.3
        yield whole(200, answer(good(said, body)))

    with StandIn({"m": slow}) as server, Terminal("evaluate", str(file), "--url", server.url, "-c", "1") as terminal:
        terminal.wait_for(r"answers .* 1/4")
        terminal.wait_for(r"100\.0 %")
        assert terminal.end() == 0
