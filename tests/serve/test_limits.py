"""The policy, the limits on one request, and all layers together."""

from __future__ import annotations

import asyncio
import email.message
import gzip
import json
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quantserve.config import HttpConfig
from quantserve.errors import UsageError
from quantserve.serve.asgi import JSON_KEY, Refused, read_body, request_scope
from quantserve.serve.gateway.middleware.bodies import BODY_KEY, release_body
from quantserve.serve.gateway.middleware.limits import Limits, Policy, layers
from quantserve.serve.gateway.middleware.trace import Trace
from quantserve.serve.headers import MAX_TOKENS_HEADER
from quantserve.serve.json_fields import INLINE, FieldReader
from quantserve.serve.replica.request_defaults import RequestDefaults

from .asgi_client import Answer, Upstream, request

CHAT = "/v1/chat/completions"
SMALL = Policy(max_body_mb=1, max_messages=3, max_prompts=6, max_tokens=100, max_choices=4, max_stops=2)


class Seen(Upstream):
    """An upstream that keeps the scope."""

    scope: Scope

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        await super().__call__(scope, receive, send)


def ask(body: object, path: str = CHAT, app: Any = None, method: str = "POST", **kwargs: Any) -> Answer:
    return asyncio.run(request(Limits(app or Upstream("m"), SMALL), method, path, body, **kwargs))


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"messages": [{}] * 4}, "messages", "`messages` has 4 messages; this server allows at most 3"),
        ({"max_tokens": 101}, "max_tokens", "`max_tokens` is 101; this server allows at most 100"),
        ({"max_completion_tokens": 10**18}, "max_completion_tokens", f"is {10**18}; this server allows at most 100"),
        ({"max_completion_tokens": 10**30}, "max_completion_tokens", f"has the number {10**30}, which does not fit"),
        (
            {"max_tokens": 1, "max_completion_tokens": "999"},
            "max_completion_tokens",
            '`max_completion_tokens` is "999";',
        ),
        ({"n": "5"}, "n", '`n` is "5"; this server allows at most 4'),
        ({"n": " 5 "}, "n", "is "),
        ({"n": 5.0}, "n", "is 5.0;"),
        ({"n": "5.0"}, "n", "is "),
        ({"n": "1_0"}, "n", "is "),
        ({"n": "+5"}, "n", "is "),
        ({"n": " " * 200 + "5"}, "n", "is "),
        ({"prompt": ["x"] * 3, "n": "4"}, "prompt", "`prompt` has 3 items, 4 times each"),
        ({"bad_words": ["a"] * 3}, "bad_words", "`bad_words` has 3 items"),
        ({"stop_sequences": ["a"] * 3}, "stop_sequences", "`stop_sequences` has 3 items"),
        ({"documents": ["x"] * 7}, "documents", "has 7 items"),
        ({"data_2": [{"content": []}] * 7}, "data_2", "has 7 items"),
        ({"texts": ["x"] * 7}, "texts", "has 7 items"),
        ({"questions": {str(number): {} for number in range(7)}}, "questions", "has 7 items"),
        ({"messages": [[{}] * 4]}, "messages", "`messages` has 4 messages"),
        ({"messages": [[{}]] * 7}, "messages", "`messages` has 7 items"),
        ({"messages": [[{}]] * 4, "n": 2}, "messages", "`messages` has 4 items, 2 times each"),
        ({"max_output_tokens": 101.5}, "max_output_tokens", "is 101.5;"),
        ({"n": 5}, "n", "`n` is 5; this server allows at most 4"),
        ({"n": 1, "best_of": 5}, "best_of", "`best_of` is 5; this server allows at most 4"),
        ({"stop": ["a"] * 3}, "stop", "`stop` has 3 items; this server allows at most 2"),
        ({"stop_token_ids": [1, 2, 3]}, "stop_token_ids", "has 3 items"),
        ({"prompt": ["x"] * 7}, "prompt", "`prompt` has 7 items; this server allows at most 6"),
        ({"prompt": [[1, 2]] * 7}, "prompt", "has 7 items"),
        ({"input": ["x"] * 7}, "input", "`input` has 7 items"),
        ({"prompt": ["x"] * 3, "n": 4}, "prompt", "`prompt` has 3 items, 4 times each; this server allows at most 6"),
        ({"top_k": 2**64}, "top_k", "`top_k` has the number 18446744073709551616, which does not fit into 64 bits"),
        ({"x": [{"y": [0, -(2**63) - 1]}]}, "x", "-9223372036854775809"),
        ({"x": [{"y": "a\ud800"}]}, "x", "`x` has text that is not valid Unicode"),
        ({"x": {"\udfff": 1}}, "x", "not valid Unicode"),
        ({"\udfff": 1}, "\\udfff", "`\\udfff` has text"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/org--model/v1/completions"])
def test_too_much(body: dict[str, Any], param: str, said: str, path: str) -> None:
    upstream = Upstream("m")
    answer = ask({"model": "m", **body}, path, upstream)
    assert (answer.status, answer.error["param"], answer.error["type"]) == (400, param, "invalid_request_error")
    assert said in answer.error["message"]
    assert upstream.bodies == []


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ({"messages": [{"role": "user"}] * 3, "max_tokens": 100, "n": 4}, {"messages": ['{"role": "user"}']}),
        ({"prompt": [1] * 200, "stop": "x" * 200}, {}),
        ({"prompt": ["x"] * 3, "n": "2"}, {}),
        ({"user": "9" * 40, "seed": 2**64 - 1, "x": [-(2**63), {"y": 1e300}]}, {"user": "9" * 40}),
        ({"user": "\U0001f600 \ud7ff\ue000", "x": "\\ud800"}, {"user": "\U0001f600 \ud7ff\ue000"}),
        ({"prompt": [], "messages": "x", "n": "4", "max_tokens": None, "best_of": True, "stop": 7}, {}),
        ({"prompt": "abc", "n": "five", "max_tokens": "1e9", "best_of": [9], "stream": True, "model": 7},
         {"prompt": '"abc"', "stream": True, "model": 7}),
        ({"messages": [], "prompt_cache_key": "x" * 5000, "model": "y" * 5000}, {"model": '"' + "y" * 39}),
    ],
)  # fmt: skip
def test_values_within_the_limits_and_wrong_types_pass(body: dict[str, Any], kept: dict[str, Any]) -> None:
    upstream = Seen("m")
    content = json.dumps(body).encode()
    assert ask(content, app=upstream, parts=3).status == 200
    assert upstream.bodies == [content]
    found = upstream.scope[JSON_KEY]
    assert {key: value for key, value in found.items() if value is not None} == kept


def test_of_a_field_given_twice_the_last_one_counts() -> None:
    assert ask(b'{"n": 500, "n": 1}').status == 200
    assert ask(b'{"n": 1, "n": 500}').error["param"] == "n"
    assert ask(b'{"n": 1, "\\u006e": 500}').error["param"] == "n"


@pytest.mark.parametrize("size", [10, INLINE])
def test_a_byte_order_mark_is_removed(size: int) -> None:
    """PowerShell and .NET send it."""
    upstream = Seen("m")
    body = json.dumps({"model": "é" * size}).encode()
    headers = {"content-length": str(len(body) + 3)}
    assert ask(b"\xef\xbb\xbf" + body, app=upstream, headers=headers).status == 200
    assert upstream.bodies == [body]
    assert (b"content-length", b"%d" % len(body)) in upstream.scope["headers"]
    assert ask(b'\xef\xbb\xbf{"n": 500}').error["param"] == "n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_bodies_must_be_utf_8(encoding: str) -> None:
    body = json.dumps({"n": 500, "x": "é"}, ensure_ascii=False).encode(encoding)
    for headers in ({}, {"content-type": "application/json; charset=utf-16"}, {"content-type": "application/x+json"}):
        answer = ask(body, headers=headers)
        assert (answer.status, answer.error["code"]) == (400, "invalid_json")


@pytest.mark.parametrize(
    "kind",
    ["application/json", "APPLICATION/JSON", " application/json ;charset=x", "application/json; a=b; c",
     "application/x+json", "application/vnd.api+json; q", "application/.+JSON", "application/json\t", ";",
     "application/+json"],
)  # fmt: skip
def test_what_fastapi_takes_for_json_is_checked(kind: str) -> None:
    message = email.message.Message()
    message["content-type"] = kind
    subtype = message.get_content_subtype()
    if message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json")):
        assert ask({"n": 500}, headers={"content-type": kind}).error["param"] == "n"


def test_compressed_bodies_are_refused_by_name() -> None:
    answer = ask(gzip.compress(b"{}"), headers={"content-encoding": "gzip"})
    assert (answer.status, answer.error["code"]) == (415, "unsupported_content_encoding")
    assert "Content-Encoding: gzip" in answer.error["message"]
    assert ask(b"{}", headers={"content-encoding": "identity"}).status == 200


def test_a_number_of_input_tokens_is_no_number_of_output_tokens() -> None:
    assert ask({"max_tokens": 512}, "/v2/embed").status == 200
    assert ask({"max_tokens": 512}, "/v2/embed/x").status == 400


@pytest.mark.parametrize("field", ["n", "max_completion_tokens"])
@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/m/v1/audio/translations/"])
def test_forms_have_the_same_limits(path: str, field: str) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}

    def form(*values: str) -> bytes:
        parts = [f'--x\r\nContent-Disposition: form-data; name="{field}"\r\n\r\n{value}\r\n' for value in values]
        return ("".join(parts) + "--x--\r\n").encode()

    assert ask(form("4"), path, headers=headers).status == 200
    for values in (("500",), (" 500 ",), ("1", "500"), ("500", "1"), (" " * 200 + "500",)):
        answer = ask(form(*values), path, headers=headers)
        assert (answer.status, answer.error["param"]) == (400, field)
    assert ask(b"--y", path, headers=headers).error["code"] == "invalid_form"


def test_forms_without_room_for_a_file_are_refused_unread() -> None:
    """The parser of such forms takes 5 s for 16 MiB of `&`."""
    headers = {"content-type": "application/x-www-form-urlencoded; charset=utf-8"}
    answer = ask(b"&" * 100, "/v1/audio/transcriptions", headers=headers)
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")
    assert answer.error["message"] == (
        "Content-Type: application/x-www-form-urlencoded is not supported here; send the audio file as "
        "multipart/form-data."
    )


@pytest.mark.parametrize("unit", [b"[],", b"{},", b'"",', b"1,", b"1.5,", b'"\\"",', b'{"a":[]},'])
def test_a_body_of_very_many_values_is_refused_before_any_is_built(unit: bytes) -> None:
    policy = Policy(max_body_mb=4)
    body = b'{"model": "m", "tools": [' + unit * (4_000_000 // len(unit)) + b"0]}"
    upstream = Upstream("m")
    tracemalloc.start()
    answer = asyncio.run(request(Limits(upstream, policy), "POST", CHAT, body))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (answer.status, answer.error["code"]) == (400, "too_many_values")
    assert "the limit is 50000" in answer.error["message"]
    assert upstream.bodies == []
    assert peak < 6 * len(body)  # objects for all values would take 20 to 60 times as much


@pytest.mark.parametrize(
    ("path", "field", "value", "status"),
    [
        ("/v1/completions", "prompt", "1", 200), ("/m/v1/completions/", "prompt", "1", 200),
        ("/v1/embeddings", "input", "-1", 200), ("/v1/embeddings", "input", "[1,2]", 400),
        ("/v1/completions", "tools", "1", 400), ("/v1/responses", "input", "1", 400),
        ("/v1/completions", "prompt", "1.5", 400), ("/v1/completions", "prompt", "true", 400),
        ("/v1/completions", "prompt", '"1"', 400), ("/v1/completions", "prompt", "[]", 400),
    ],
)  # fmt: skip
def test_token_ids_of_a_prompt_may_be_many(path: str, field: str, value: str, status: int) -> None:
    body = f'{{"{field}": [{",".join([value] * 9000)}]}}'.encode()
    answer = asyncio.run(request(Limits(Upstream("m"), Policy(max_json_values=1000)), "POST", path, body))
    assert answer.status == status
    if field == "tools":
        assert "10 token ids count as one" in answer.error["message"]
    body = f'{{"{field}": [{",".join([value] * 11_000)}]}}'.encode()
    assert asyncio.run(request(Limits(Upstream("m"), Policy(max_json_values=1000)), "POST", path, body)).status == 400


def test_text_with_the_signs_of_values_is_not_counted_as_values() -> None:
    policy = Policy(max_json_values=1000)
    content = json.dumps({"prompt": '[{"a": 1, "b": [2, 3]}]\\' * 50_000}).encode()
    upstream = Upstream("m")
    assert asyncio.run(request(Limits(upstream, policy), "POST", CHAT, content)).status == 200
    assert upstream.bodies == [content]


def test_long_bodies_are_not_parsed_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()
    read = FieldReader.read

    def noted(self: FieldReader, body: bytes) -> Any:
        threads.add(threading.get_ident())
        return read(self, body)

    monkeypatch.setattr(FieldReader, "read", noted)
    assert ask({"prompt": "x" * 500_000}).status == 200
    assert threads
    assert threading.get_ident() not in threads


async def held(limits: Limits, body: bytes, *, parts: list[bytes] | None = None) -> tuple[asyncio.Event, Any]:
    """A request whose body never ends; returns when its first part was read."""
    read = asyncio.Event()
    pieces = [*(parts or [body])]

    async def receive() -> dict[str, Any]:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": True}
        read.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        raise AssertionError

    scope = request_scope("POST", CHAT, [(b"content-type", b"application/json")])
    task = asyncio.create_task(limits(scope, receive, send))  # type: ignore[arg-type]
    await read.wait()
    return read, task


def test_the_bytes_of_all_bodies_are_bounded() -> None:
    async def work() -> None:
        limits = Limits(Upstream("m"), Policy(max_body_mb=1, max_buffered_mb=2))
        tasks = [(await held(limits, b"x" * (900 << 10)))[1] for _ in range(2)]
        assert limits.buffers.held == 2 * (900 << 10)
        content = b'{"x": "' + b"y" * (400 << 10) + b'"}'
        for headers in ({"content-length": str(len(content))}, {}):
            answer = await request(limits, "POST", CHAT, content, parts=4, headers=headers)
            assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "server_busy", "5")
        assert (await request(limits, "POST", CHAT, {"x": 1})).status == 200  # a short one has room
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        assert (await request(limits, "POST", CHAT, content)).status == 200
        tasks[1].cancel()
        await asyncio.gather(tasks[1], return_exceptions=True)
        assert limits.buffers.held == 0

    asyncio.run(work())


def test_a_declared_body_that_does_not_arrive_takes_no_room() -> None:
    async def work() -> None:
        limits = Limits(Upstream("m"), Policy(max_body_mb=1, max_buffered_mb=1))
        _, task = await held(limits, b"", parts=[b"{"])
        assert limits.buffers.held == 1
        assert (await request(limits, "POST", CHAT, {"x": "y" * 500_000})).status == 200
        task.cancel()

    asyncio.run(work())


def test_a_body_is_released_as_soon_as_it_is_not_needed() -> None:
    held_after: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(receive)
        held_after.append(limits.buffers.held)
        assert scope[BODY_KEY].content is body
        release_body(scope)
        alone = sys.getrefcount(body)
        held_after.append(limits.buffers.held)
        assert alone == 2  # this function's and the argument's only
        await Response()(scope, receive, send)

    limits = Limits(app, SMALL)
    content = json.dumps({"x": "y" * 1000}).encode()
    assert asyncio.run(request(limits, "POST", CHAT, content, parts=2)).status == 200
    assert held_after == [len(content), 0]


def test_a_body_with_a_get_request_is_bounded_too() -> None:
    assert ask(b"x" * ((1 << 20) + 1), "/v1/models", method="GET", parts=3).status == 413


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x", None])
@pytest.mark.parametrize("declared", [True, False])
def test_bodies_that_are_too_long(kind: str | None, declared: bool) -> None:
    upstream = Upstream("m")
    body = json.dumps({"prompt": "x" * (1 << 20)}).encode()
    headers = {"content-type": kind or ""}
    if declared:
        headers["content-length"] = str(len(body))
    answer = ask(body, "/v1/audio/transcriptions", upstream, parts=5, headers=headers)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (413, "request_too_large", None)
    assert "the limit is 1048576 bytes" in answer.error["message"]
    assert (f"too large: {len(body)} bytes" in answer.error["message"]) == declared
    assert upstream.bodies == []
    fits = b"x" * (1 << 20)
    assert ask(fits, "/upload", upstream, parts=5, headers={"content-type": "text/plain"}).status == 200
    assert upstream.bodies == [fits]


def test_bytes_of_half_a_surrogate_pair() -> None:
    assert ask(b'{"x": "\xed\xa0\x80"}').error["param"] == "x"
    assert ask(b'{"x": "' + b"y" * 300_000 + b'\xed\xa0\x80"}').error["code"] == "invalid_json"
    assert ask(b'{"x": "\xed\x9f\xbf"}').status == 200


def test_bodies_that_are_no_json() -> None:
    assert ask(b"{", headers={"content-type": "application/json"}).error["code"] == "invalid_json"
    assert ask(b"[1]").status == 400
    assert ask(b"", "/reset_prefix_cache").status == 200
    assert ask(b"{", headers={"content-type": ""}).status == 200  # left to vLLM
    assert ask(None, "/v1/models", method="GET").status == 200


def test_a_stream_is_noted() -> None:
    seen: list[Trace] = []
    app = layers(Upstream("m"), Policy(), [seen.append])
    for body in ({"stream": True}, {"stream": False}, {}):
        asyncio.run(request(app, "POST", CHAT, body))
    assert [trace.stream for trace in seen] == [True, False, False]


@pytest.mark.parametrize(
    ("path", "given", "becomes"),
    [
        (CHAT, {}, {"max_tokens": 100}),
        (CHAT, {"max_tokens": None}, {"max_tokens": 100}),
        (CHAT, {"max_tokens": 7}, {"max_tokens": 7}),
        (CHAT, {"max_completion_tokens": 7}, {"max_completion_tokens": 7}),
        (CHAT, {"max_completion_tokens": None, "max_tokens": "7"}, {"max_completion_tokens": None, "max_tokens": "7"}),
        ("/v1/chat/completions/batch", {}, {"max_tokens": 100}),
        ("/cohere/v2/chat", {}, {"max_tokens": 100}),
        ("/v1/messages", {"max_tokens": 7}, {"max_tokens": 7}),  # required there
        ("/invocations", {"messages": []}, {"messages": [], "max_tokens": 100}),
        ("/invocations", {"prompt": ""}, {"prompt": ""}),
        ("/v1/completions", {}, {}),  # vLLM's default is 16
        ("/v1/completions", {"max_tokens": None}, {"max_tokens": 100}),
        ("/v1/responses", {}, {"max_output_tokens": 100}),
        ("/v1/embeddings", {}, {}),
    ],
)
def test_the_cap_holds_for_requests_that_name_no_number(
    path: str, given: dict[str, Any], becomes: dict[str, Any]
) -> None:
    upstream = Seen("m")
    app = RequestDefaults(upstream, {}, max_model_len=4096)
    headers = {MAX_TOKENS_HEADER.decode(): "3000"}  # a client's own means nothing
    assert ask({"model": "m", **given}, path, app, headers=headers).status == 200
    assert json.loads(upstream.bodies[0]) == {"model": "m", **becomes}
    assert [value for key, value in upstream.scope["headers"] if key == MAX_TOKENS_HEADER] == [b"100"]
    lengths = [value for key, value in upstream.scope["headers"] if key == b"content-length"]
    assert lengths in ([], [str(len(upstream.bodies[0])).encode()])


def test_the_cap_and_a_models_own_defaults() -> None:
    for default, length, expected in ((9, 4096, 9), (500, 4096, 100), (None, 64, None), (None, None, None)):
        upstream = Upstream("m")
        ask({"model": "m"}, app=RequestDefaults(upstream, {"max_tokens": default}, length))
        assert json.loads(upstream.bodies[0]).get("max_tokens") == expected


def test_without_a_cap_a_clients_header_is_dropped() -> None:
    upstream = Seen("m")
    headers = {MAX_TOKENS_HEADER.decode(): "3", "x_quantserve_max-tokens": "4"}
    asyncio.run(request(Limits(upstream, Policy()), "POST", CHAT, {"model": "m"}, headers=headers))
    assert [value for _, value in upstream.scope["headers"]] == [b"application/json"]


def test_a_policy_is_plain_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTSERVE_API_KEYS", "key-of-the-environment")
    (tmp_path / "keys").write_text("key-of-the-file\n")
    http = HttpConfig(
        api_keys_file=str(tmp_path / "keys"), max_body_mb=3, max_tokens=50, cors_origins=["https://a.example"],
        request_timeout_s=5, access_log="off",
    )  # fmt: skip
    policy = Policy.of(http)
    text = json.dumps(policy.model_dump(mode="json"))
    assert Policy.model_validate(json.loads(text)) == policy
    assert "key-of" not in text
    assert (policy.has_keys, len(policy.keys.digests), policy.max_body_bytes) == (True, 2, 3 << 20)
    assert (policy.max_tokens, policy.request_timeout_s, policy.queue_timeout_s) == (50, 5, 30)


def test_policy_has_the_limits_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANTSERVE_API_KEYS", raising=False)
    assert Policy.of(HttpConfig()) == Policy()


def test_an_access_log_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"access log .*file/log: .*\n  fix"):
        Policy.of(HttpConfig(access_log=str(tmp_path / "file" / "log")))


def test_all_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTSERVE_API_KEYS", "key-number-one")
    seen: list[Trace] = []
    http = HttpConfig(cors_origins=["https://a.example"], access_log=str(tmp_path / "log"), max_messages=2)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/bug":
            raise RuntimeError("secret text")
        if scope["path"] == "/refused":
            raise Refused(429, "busy", headers={"retry-after": "3"})
        await Upstream("m")(scope, receive, send)

    stack = layers(app, Policy.of(http), [seen.append])
    key = {"authorization": "Bearer key-number-one", "origin": "https://a.example", "x-request-id": "mine"}
    cases: list[tuple[str, dict[str, str], object, int]] = [
        (CHAT, key, {"messages": []}, 200),
        (CHAT, key, {"messages": [1, 2, 3]}, 400),
        (CHAT, {**key, "authorization": "Bearer key-number-two"}, {}, 401),
        ("/bug", key, {}, 500),
        ("/refused", key, {}, 429),
    ]
    for path, headers, body, status in cases:
        answer = asyncio.run(request(stack, "POST", path, body, headers=headers))
        assert answer.status == status
        assert answer.headers["x-request-id"] == "mine"
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert b"secret" not in answer.body
        if status >= 400:
            assert answer.error["message"]
    assert [trace.status for trace in seen] == [status for *_, status in cases]
