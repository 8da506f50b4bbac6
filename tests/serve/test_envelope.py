"""Errors of vLLM's server come out in OpenAI's envelope."""

from __future__ import annotations

import asyncio
import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator, model_validator
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from quantserve.serve.asgi import TYPES, error_type
from quantserve.serve.replica.vllm.envelope import READERS, Envelope, install
from quantserve.serve.replica.vllm.errors import refusal

from .asgi_client import Answer, request

CHAT = "/v1/chat/completions"
ANSWERS = json.loads((Path(__file__).parent / "vllm_errors.json").read_text())
"""What vLLM 0.32's server answered to broken requests, word for word."""


class Answers:
    """An app that gives one answer, its body in several pieces."""

    def __init__(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = {"content-type": "application/json", "content-length": str(len(self.body)), **(headers or {})}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(key.encode(), value.encode()) for key, value in self.headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for start in range(0, len(self.body), 50):
            await send({"type": "http.response.body", "body": self.body[start : start + 50], "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def enveloped(
    status: int, body: object, path: str = CHAT, method: str = "POST", headers: dict[str, str] | None = None
) -> Answer:
    answer = asyncio.run(request(Envelope(Answers(status, body, headers)), method, path, {}))
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert answer.error["type"] == error_type(answer.status)
    return answer


@pytest.mark.parametrize("case", ANSWERS, ids=lambda case: case["what"])
def test_recorded_vllm_errors(case: dict[str, Any]) -> None:
    answer = enveloped(case["status"], case["body"].encode(), case["path"], case["method"])
    expected = case["becomes"]
    assert answer.status == expected.get("status", case["status"])
    assert (answer.error["code"], answer.error["param"]) == (expected["code"], expected["param"])
    assert expected["says"] in answer.error["message"]
    for unwanted in ("parameter=", "value=", "Traceback", "{'type'", 'File "'):
        assert unwanted not in answer.error["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": "Unauthorized"}, "Unauthorized"),
        ({"detail": "no such thing"}, "no such thing"),
        ({"message": "no such thing"}, "no such thing"),
        ({"type": "error", "error": {"type": "x", "message": "Anthropic's"}}, "Anthropic's"),
        ("just text", "just text"),
        (b"plain text\n", "plain text"),
        (b"<html><h1>Bad</h1></html>", "Bad Request"),
        (b"", "Bad Request"),
        ([1, 2], "Bad Request"),
        ({"error": [1]}, "Bad Request"),
        ({"error": {"message": 7}}, "Bad Request"),
        ({"error": {"message": ""}}, "Bad Request"),
        (b"[" * 5000, "Bad Request"),
    ],
)
def test_other_forms_of_errors(body: object, message: str) -> None:
    assert enveloped(400, body).error == {
        "message": message, "type": "invalid_request_error", "param": None, "code": None
    }  # fmt: skip


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 418, 422, 429, 499])
def test_types_follow_the_status(status: int) -> None:
    answer = enveloped(status, {"error": {"message": "m", "type": "BadRequestError", "param": "p", "code": status}})
    assert (answer.status, answer.error["param"]) == (status, "p")
    assert answer.error["type"] == TYPES.get(status, "invalid_request_error")


def test_allow_retry_after_and_authenticate_headers_are_kept() -> None:
    answer = enveloped(405, b"Method Not Allowed", method="DELETE", headers={"allow": "GET, HEAD", "x-inside": "1"})
    assert answer.error["message"] == f"Method DELETE is not allowed for {CHAT}."
    assert answer.headers["allow"] == "GET, HEAD"
    assert "x-inside" not in answer.headers
    assert enveloped(429, b"", headers={"retry-after": "7"}).headers["retry-after"] == "7"


def test_a_long_message_is_cut() -> None:
    assert len(enveloped(400, {"error": {"message": "x" * 3_000_000}}).body) < 2000


@pytest.mark.parametrize(("down", "status"), [(False, 500), (True, 503)])
def test_internal_details_are_logged_and_not_sent(down: bool, status: int, caplog: pytest.LogCaptureFixture) -> None:
    app = Envelope(Answers(500, {"error": {"message": "KeyError: 'secret' in /opt/x.py"}}), lambda: down)
    with caplog.at_level(logging.ERROR):
        answer = asyncio.run(request(app, "POST", CHAT, {}))
    assert answer.status == status
    assert "secret" not in json.dumps(answer.error)
    assert "KeyError: 'secret' in /opt/x.py" in caplog.text
    assert ("retry-after" in answer.headers) == down


def test_successful_responses_are_not_changed() -> None:
    body = {"error": {"message": "not one"}}
    answer = asyncio.run(request(Envelope(Answers(200, body, {"x-own": "1"})), "POST", CHAT, {}))
    assert (answer.status, answer.json, answer.headers["x-own"]) == (200, body, "1")
    assert len(answer.chunks) > 1


def stream(*events: bytes, path: str = CHAT) -> Answer:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for event in events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return asyncio.run(request(Envelope(app), "POST", path, {}))


def test_errors_inside_a_stream() -> None:
    first, last = b'data: {"id": "1", "choices": [{"text": "error"}]}\n\n', b"data: [DONE]\n\n"
    inner = {"message": "secret in /opt/x.py", "type": "InternalServerError", "param": None, "code": 500}
    chunks = stream(first, b"data: " + json.dumps({"error": inner}).encode() + b"\n\n", last).chunks
    assert (chunks[0], chunks[2], chunks[3]) == (first, last, b"")
    assert chunks[1].startswith(b"data: ")
    assert chunks[1].endswith(b"\n\n")
    error = json.loads(chunks[1][6:])["error"]
    assert error == {
        "message": "Internal error. The server's log has the details.",
        "type": "server_error", "param": None, "code": None,
    }  # fmt: skip
    client = {"message": "too long (parameter=x, value=3)", "type": "BadRequestError", "param": "x", "code": 400}
    error = json.loads(stream(first, b"data: " + json.dumps({"error": client}).encode() + b"\n\n").chunks[1][6:])[
        "error"
    ]
    assert error == {"message": "too long", "type": "invalid_request_error", "param": "x", "code": "invalid_value"}


def test_anthropics_error_events() -> None:
    first = b"event: message_start\ndata: {}\n\n"
    inner = {"type": "error", "error": {"type": "internal_error", "message": "secret"}}
    event = b"event: error\ndata: " + json.dumps(inner).encode() + b"\n\n"
    (_, chunk, _) = stream(first, event, path="/v1/messages").chunks
    assert chunk.startswith(b"event: error\ndata: {")
    found = json.loads(chunk.partition(b"data: ")[2])
    assert (found["type"], found["error"]["type"]) == ("error", "server_error")
    assert b"secret" not in chunk
    assert b"secret" not in stream(first, b"event: error\ndata: secret\n\n").chunks[1]


@pytest.mark.parametrize(("code", "status"), [(400, 400), (404, 404), (500, 500), ("x", 500), (None, 500), (200, 500)])
def test_a_stream_that_begins_with_an_error_is_a_response_with_its_status(code: object, status: int) -> None:
    """vLLM sends status 200 before the engine has seen the request."""
    error = {"message": "no", "type": "BadRequestError", "param": "top_p", "code": code}
    answer = stream(b"data: " + json.dumps({"error": error}).encode() + b"\n\n", b"data: [DONE]\n\n")
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
    assert answer.error["param"] == ("top_p" if status == 400 else answer.error["param"])
    assert b"DONE" not in answer.body


# --- requests that do not fit ---------------------------------------------------------------------------


class Cause(ValueError):
    parameter = "top_p"

    def __str__(self) -> str:
        return "top_p must be in (0, 1], got 5. (parameter=top_p, value=5)"


class Image(BaseModel):
    url: str


class Message(BaseModel):
    role: Literal["user", "assistant"]
    content: str | list[Image]


class SystemMessage(BaseModel):
    role: Literal["system"]
    content: str


class ToolMessage(BaseModel):
    role: Literal["tool"]
    content: str
    tool_call_id: str


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[SystemMessage | Message | ToolMessage]
    temperature: float | None = Field(default=None, ge=0)
    n: int = 1
    stop: str | list[str] | None = None
    top_p: float = 1
    outputs: Any = None

    @model_validator(mode="before")
    @classmethod
    def _outputs(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("outputs") is not None:
            data["outputs"].get("json")  # as vLLM's validators do
        return data

    @field_validator("top_p")
    @classmethod
    def _top_p(cls, value: float) -> float:
        if not 0 < value <= 1:
            raise Cause
        return value


@pytest.fixture(scope="module")
def fastapi_app() -> FastAPI:
    app = FastAPI()
    app.add_exception_handler(ValueError, lambda request, error: PlainTextResponse(str(error), 400))
    app.middleware_stack = app.build_middleware_stack()  # as vLLM's app comes
    install(app)

    @app.post("/v1/chat/completions")
    async def chat(body: Body) -> dict[str, bool]:
        return {"ok": True}

    @app.post("/broken")
    async def broken(body: Body) -> None:
        [].get("json")  # type: ignore[attr-defined]

    @app.post("/later")
    async def later(body: dict[str, Any]) -> None:
        TypeAdapter(list[dict[str, int]]).validate_python(body["items"])
        Body.model_validate({**GOOD, **body})

    @app.post("/media")
    async def media() -> None:
        raise RequestValidationError(errors=["Unsupported Media Type: Only 'application/json' is allowed"])

    return app


GOOD: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("body", "param", "code", "said"),
    [
        ({"messages": []}, "model", "missing_required_parameter", "`model` is missing"),
        ({}, "model", "missing_required_parameter", "`model` is missing; `messages` is missing"),
        ([1], None, "invalid_type", "The request body must be an object"),
        ({**GOOD, "messages": "x"}, "messages", "invalid_type", "`messages` must be a list"),
        ({**GOOD, "messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter", "is missing"),
        ({**GOOD, "messages": [*GOOD["messages"], {"role": "x", "content": ""}]}, "messages[1].role", "invalid_value",
         "`messages[1].role` must be 'system' or 'user' or 'assistant'"),
        ({**GOOD, "messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id",
         "missing_required_parameter", "`messages[0].tool_call_id` is missing"),
        ({**GOOD, "messages": [{"role": "user", "content": 7}]}, "messages[0].content", "invalid_type",
         "`messages[0].content` must be a string or a list"),
        ({**GOOD, "messages": [{"role": "user", "content": [{"url": 1}]}]}, "messages[0].content[0].url",
         "invalid_type", "`messages[0].content[0].url` must be a string"),
        ({**GOOD, "temperature": "hot"}, "temperature", "invalid_type", "`temperature` must be a number"),
        ({**GOOD, "temperature": -1}, "temperature", "invalid_value", "must be greater than or equal to 0"),
        ({**GOOD, "n": 1.5}, "n", "invalid_type", "must be an integer"),
        ({**GOOD, "stop": ["a", 1]}, "stop[1]", "invalid_type", "`stop[1]` must be a string"),
        ({**GOOD, "stop": 1}, "stop", "invalid_type", "`stop` must be a string or a list"),
        ({**GOOD, "top_p": 5}, "top_p", "invalid_value", "top_p must be in (0, 1], got 5."),
        ({**GOOD, "temprature": 1}, "temprature", "unknown_parameter", "`temprature` is not a known field"),
        (b"{", None, "invalid_json", "The request body is not valid JSON: "),
    ],
)  # fmt: skip
def test_requests_that_do_not_fit(fastapi_app: FastAPI, body: object, param: str | None, code: str, said: str) -> None:
    answer = asyncio.run(request(Envelope(fastapi_app), "POST", CHAT, body))
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, param, code)
    assert said in answer.error["message"]
    assert "(parameter" not in answer.error["message"]


def test_an_unsupported_request_is_a_client_error(caplog: pytest.LogCaptureFixture) -> None:
    answer = asyncio.run(request(Envelope(Answers(501, {"error": {"message": "Not here", "code": 501}})), "POST", CHAT))
    assert (answer.status, answer.error["code"], answer.error["type"]) == (
        400,
        "not_supported",
        "invalid_request_error",
    )
    assert not caplog.records


def test_only_exceptions_while_parsing_are_client_errors(fastapi_app: FastAPI) -> None:
    answer = asyncio.run(request(Envelope(fastapi_app), "POST", CHAT, {**GOOD, "outputs": []}))
    assert (answer.status, answer.error["code"]) == (400, "invalid_type")
    assert "attribute" not in answer.error["message"]
    with pytest.raises(AttributeError):  # as every FastAPI app, after an answer with status 500
        asyncio.run(request(Envelope(fastapi_app), "POST", "/broken", GOOD))


def test_parts_that_vllm_validates_later(fastapi_app: FastAPI) -> None:
    """vLLM answers these with pydantic's own text, the client's input in it."""
    app = Envelope(fastapi_app)
    answer = asyncio.run(request(app, "POST", "/later", {"items": [{}, "x"]}))
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, "items[1]", "invalid_type")
    assert answer.error["message"] == "`items[1]` must be an object"
    answer = asyncio.run(request(app, "POST", "/later", {"items": [], "n": "many"}))
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, "n", "invalid_type")
    assert answer.error["message"].startswith("`n` must be an integer")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"content": "x"}, "`messages[0].role` is missing"),
        ({"role": "user", "content": 7}, "`messages[0].content` must be a string or a list"),
        ({"role": "tool", "content": "x"}, "`messages[0].tool_call_id` is missing"),
        (7, "`messages[0]` must be an object"),
    ],
)  # fmt: skip
def test_only_the_most_likely_branch_of_a_union_is_reported(fastapi_app: FastAPI, message: object, said: str) -> None:
    """pydantic has four to six errors for each of these."""
    answer = asyncio.run(request(Envelope(fastapi_app), "POST", CHAT, {**GOOD, "messages": [message]}))
    assert answer.error["message"] == said


def test_the_input_is_not_repeated(fastapi_app: FastAPI) -> None:
    body = {**GOOD, "messages": [{"role": "secret", "content": {"secret": 1}}] * 1000}
    answer = asyncio.run(request(Envelope(fastapi_app), "POST", CHAT, body))
    assert answer.status == 400
    assert b"secret" not in answer.body
    assert len(answer.body) < 2000
    assert "more fields" in answer.error["message"]


def test_a_body_not_declared_as_json(fastapi_app: FastAPI) -> None:
    answer = asyncio.run(request(Envelope(fastapi_app), "POST", "/media", {}))
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")
    good = asyncio.run(request(Envelope(fastapi_app), "POST", CHAT, GOOD))
    assert (good.status, good.json) == (200, {"ok": True})


@pytest.mark.parametrize(("name", "package"), READERS)
def test_the_functions_that_parse_requests_exist(name: str, package: str) -> None:
    """Their names are searched in tracebacks: a renamed one would turn 400 into 500."""
    spec = find_spec(package)
    assert spec is not None
    folder = next(iter(spec.submodule_search_locations or ()))
    assert any(f"def {name}(" in path.read_text() for path in Path(folder).rglob("*.py"))


TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("f", "g")]


@pytest.mark.parametrize(
    ("client", "param"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
         "tools[1].function.parameters"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tools"),
        ({"tools": TOOLS[:1], "tool_choice": "required"}, "tools[0].function.parameters"),
        ({"tools": [{"name": "f", "input_schema": {}}]}, "tools[0].input_schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
         "response_format.json_schema.schema"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"tools": 7, "tool_choice": {"function": "x"}}, "structured_outputs"),
        ([], "structured_outputs"),
    ],
)  # fmt: skip
def test_the_field_of_a_schema_is_the_clients(client: Any, param: str) -> None:
    error = {"error": {"message": "no", "param": "structured_outputs", "code": 400}}
    assert refusal(400, "POST", CHAT, json.dumps(error).encode(), client).error["param"] == param


@pytest.mark.parametrize(
    ("path", "field"), [(CHAT, "messages"), ("/v1/responses", "input"), ("/v1/messages", "messages")]
)
def test_the_field_with_an_image_is_the_clients(path: str, field: str) -> None:
    error = {"error": {"message": "m is not a multimodal model", "param": None, "code": 400}}
    assert refusal(400, "POST", path, json.dumps(error).encode(), {field: []}).error["param"] == field
