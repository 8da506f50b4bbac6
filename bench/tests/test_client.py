"""The client against a server with scripted timing."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from quantserve.errors import UsageError
from quantserve_bench import Closed, Kind, Live, Request, Result, Run, Target, run, run_blocking

from .fake_server import (
    DONE,
    END,
    FINISH,
    ROLE,
    FakeServer,
    Script,
    Step,
    chunk,
    delta,
    event,
    head,
    stream,
    usage,
    whole,
)

ASK = Request(messages=[{"role": "user", "content": "Hi"}], max_tokens=8, temperature=0)
LATE_S = 30.0
"""How late a busy machine may see what the server did."""


def ask(
    script: Script, requests: list[Request] | None = None, users: int = 1, **options: Any
) -> tuple[FakeServer, Run]:
    with FakeServer(script) as server:
        return server, run_blocking(run(Target(server.url, "m"), requests or [ASK], Closed(users), **options))


def one(*steps: Step, requests: list[Request] | None = None, **options: Any) -> Result:
    _, results = ask(lambda number, body: steps, requests, **options)
    assert len(results) == 1
    return results.results[0]


def kinds(result: Result) -> list[tuple[Kind, str]]:
    return [(event.kind, event.text) for event in result.events]


def test_times_are_those_of_the_server() -> None:
    server, results = ask(lambda n, b: stream([(0.15, ["a"]), (0.1, ["b", "c"]), (0.2, ["d"])], prompt=7))
    result, truth = results.results[0], server.exchanges[0]
    assert result.failure is None
    assert (result.text, result.finish_reason) == ("abcd", "stop")
    assert result.usage is not None
    assert (result.usage.prompt, result.usage.completion) == (7, 4)
    assert [kind for kind, _ in kinds(result)] == [Kind.EMPTY, *[Kind.CONTENT] * 4, Kind.EMPTY, Kind.USAGE]
    # Writes: head, role, a, bc, d, the rest.
    sent = [truth.writes[number] for number in (2, 3, 3, 4)]
    for seen, wrote in zip(result.token_times, sent, strict=True):
        assert -0.001 <= seen - wrote < LATE_S
    assert result.token_times[1] == result.token_times[2]
    assert result.token_times[0] - result.start >= 0.15
    assert result.head is not None
    assert result.start <= truth.came < result.head < result.token_times[0] <= result.end


def test_the_encoded_request() -> None:
    request = Request(
        messages=[{"role": "user", "content": "Grüße"}], max_tokens=3, ignore_eos=True, extra={"top_p": 0.5}
    )
    with FakeServer(lambda n, b: stream([(0.0, ["x"])])) as server:
        target = Target(server.url + "/some/path/v1", "name", api_key="k", headers={"X-Test": "1"})
        run_blocking(run(target, [request, Request(prompt=[1, 2], stream=False)], Closed(1)))
    chat, completion = server.exchanges
    assert chat.head.startswith("POST /some/path/v1/chat/completions HTTP/1.1\r\n")
    assert "Authorization: Bearer k\r\n" in chat.head
    assert "X-Test: 1\r\n" in chat.head
    assert chat.body == {
        "model": "name",
        "messages": [{"role": "user", "content": "Grüße"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 3,
        "ignore_eos": True,
        "top_p": 0.5,
    }
    assert completion.head.startswith("POST /some/path/v1/completions HTTP/1.1\r\n")
    assert completion.body == {"model": "name", "stream": False, "prompt": [1, 2]}
    assert completion.connection == chat.connection


def test_reads_of_single_bytes() -> None:
    answer = b"".join(step for step in stream([(0.0, ["é", "\u2028"])]) if isinstance(step, bytes))
    steps: list[Step] = []
    for number in range(len(answer)):
        steps += [answer[number : number + 1], 0.0]
    result = one(*steps)
    assert result.failure is None
    assert result.text == "é\u2028"
    assert result.usage is not None


def test_reasoning_tools_and_texts_of_completions() -> None:
    body = [
        delta(reasoning_content="hm"),
        delta(reasoning="m"),
        delta(content=None, tool_calls=[{"index": 0}]),
        event({"choices": [{"index": 0, "text": "t", "finish_reason": "length"}]}),
        b": ping\n\n",
        event({"choices": [{"delta": {"content": "x"}}], "usage": {"prompt_tokens": 1, "completion_tokens": 9}}),
        DONE,
    ]
    result = one(head(), *map(chunk, body), END)
    assert kinds(result) == [
        (Kind.REASONING, "hm"),
        (Kind.REASONING, "m"),
        (Kind.TOOL_CALL, ""),
        (Kind.CONTENT, "t"),
        (Kind.CONTENT, "x"),
    ]
    assert result.events[-1].tokens == 9
    assert result.finish_reason == "length"


def test_without_streaming() -> None:
    answer = {
        "choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 3},
    }
    result = one(0.05, whole(200, answer), requests=[Request(prompt="x", stream=False)])
    assert result.ok
    assert (result.text, result.events) == ("hello", [])
    assert result.usage is not None
    assert result.usage.completion == 3
    assert result.end - result.start >= 0.05


@pytest.mark.parametrize(
    ("steps", "code", "words"),
    [
        ([whole(404, {"error": {"message": "no model `m`"}})], 404, "no model `m`"),
        ([whole(422, {"detail": [{"msg": "bad"}]})], 422, "bad"),
        ([head(500, "text/plain"), chunk(b"oops"), END], 500, "oops"),
        ([b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n"], 503, "HTTP 503"),
        (
            [head(), chunk(ROLE), chunk(event({"error": {"message": "engine died", "code": 500}})), END],
            500,
            "engine died",
        ),
        ([head(), chunk(event({"error": {"message": "busy", "code": "queue_full"}})), END], "queue_full", "busy"),
        ([head(), chunk(ROLE + delta(content="x")), END], "incomplete", "without [DONE]"),
        ([head(), chunk(event(b"{nonsense")), END], "protocol", "no JSON object"),
        ([whole(200, [1])], "protocol", "no JSON object"),
        (["close"], "closed", "before the response began"),
        ([head(), chunk(ROLE), "close"], "closed", "in the middle of the response"),
        ([head(), chunk(ROLE), 0.02, "reset"], "reset", "ConnectionResetError"),
        ([b"nonsense\r\n\r\n"], "protocol", "not an HTTP/1.1 response"),
    ],
)
def test_failures_have_codes(steps: list[Step], code: int | str, words: str) -> None:
    result = one(*steps)
    assert result.failure is not None
    assert result.failure.code == code
    assert words in result.failure.message


def test_retry_after_is_obeyed_by_a_closed_load() -> None:
    def script(number: int, body: dict[str, Any]) -> Any:
        return (
            [whole(429, {"error": {"message": "full"}}, "Retry-After: 0.3")] if number == 0 else stream([(0.0, ["a"])])
        )

    _, results = ask(script, [ASK, ASK])
    refused, served = results.results
    assert (refused.status, refused.retry_after_s) == (429, 0.3)
    assert served.ok
    assert served.start - refused.end >= 0.29  # timers of milliseconds


def test_stalls_and_timeouts() -> None:
    silent = one(head(), chunk(ROLE), 100.0, stall_s=0.2)
    assert silent.failure is not None
    assert silent.failure.code == "stalled"
    assert 0.2 <= silent.end - silent.start < 0.2 + LATE_S
    slow = one(
        head(), *[step for _ in range(200) for step in (0.05, chunk(delta(content="a")))], stall_s=60, timeout_s=1.5
    )
    assert slow.failure is not None
    assert slow.failure.code == "timeout"
    assert 1.5 <= slow.end - slow.start < 1.5 + LATE_S
    assert "a" in slow.text  # what came is kept
    assert one(0.3, *stream([(0.3, ["a"])] * 6, role_after=0.3), stall_s=2.0).ok


def test_a_connection_that_the_server_closed_is_replaced() -> None:
    """Idle connections may be closed at any time; that is no failure. A close that answers a request is one."""

    def script(number: int, body: dict[str, Any]) -> Any:
        return ["close"] if number == 1 else stream([(0.0, ["a"])])

    server, results = ask(script, [ASK, ASK, ASK])
    assert [result.ok for result in results] == [True, True, True]
    assert [exchange.connection for exchange in server.exchanges] == [1, 1, 2, 2]
    server, results = ask(lambda number, body: ["close"], [ASK, ASK])
    assert [result.failure.code for result in results if result.failure] == ["closed", "closed"]


def test_connection_close_is_respected() -> None:
    def script(number: int, body: dict[str, Any]) -> Any:
        answer = list(stream([(0.0, ["a"])]))
        return [head(200, "text/event-stream", "Connection: close"), *answer[1:]]

    server, results = ask(script, [ASK, ASK])
    assert all(result.ok for result in results)
    assert [exchange.connection for exchange in server.exchanges] == [1, 2]


def test_connection_refused() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = run_blocking(run(Target(f"http://127.0.0.1:{port}", "m"), [ASK, ASK], Closed(2)))
    assert [result.failure.code for result in results if result.failure] == ["refused", "refused"]
    unknown = run_blocking(run(Target("http://no.such.host.invalid", "m"), [ASK], Closed(1)))
    assert unknown.results[0].failure is not None
    assert unknown.results[0].failure.code in ("dns", "connect", "connect-timeout")


def test_counters_for_a_display() -> None:
    live = Live()

    def script(number: int, body: dict[str, Any]) -> Any:
        return [whole(500, {})] if number == 2 else stream([(0.05, ["a"]), (0.05, ["b"])])

    ask(script, [ASK] * 3, live=live)
    assert (live.sent, live.finished, live.failed, live.in_flight) == (3, 3, 1, 0)
    assert len(live.first_tokens) == 2
    assert all(0.05 <= seconds < 0.05 + LATE_S for seconds in live.first_tokens)
    assert live.events >= 4


def test_usage_only_and_done_in_separate_reads_end_the_answer() -> None:
    result = one(
        head(), chunk(delta(content="a")), chunk(FINISH), 0.05, chunk(usage(1, 1)), 0.05, chunk(DONE), 0.05, END
    )
    assert result.ok
    assert result.end > result.token_times[-1]


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://h:port"])
def test_a_url_must_be_one(url: str) -> None:
    with pytest.raises(UsageError, match="fix: write it as http"):
        Target(url, "m")


def test_a_key_that_no_header_can_hold() -> None:
    with pytest.raises(UsageError, match="the API key"):
        Target("http://x", "m", api_key="a\r\nX-Evil: 1")
