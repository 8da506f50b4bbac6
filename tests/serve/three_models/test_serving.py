"""Three models at once through the real thing, asked with the openai client and plain HTTP."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from ..server import KEY, Server, metric, until
from .conftest import MODELS

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

QUESTION: Any = [{"role": "user", "content": "What does str.join do?"}]


def route(model: str) -> str:
    return "/" + model.replace("/", "--")


def chat(server: Server, model: str, prefix: str = "", **kwargs: Any) -> Any:
    kwargs = {"max_tokens": 24, "temperature": 0, **kwargs}
    return server.client(prefix).chat.completions.create(model=model, messages=QUESTION, **kwargs)


@pytest.mark.parametrize("model", MODELS)
def test_chat_streaming_and_not_on_both_routes(server: Server, model: str) -> None:
    answers = []
    for prefix in ("", route(model)):
        whole = chat(server, model, prefix)
        assert whole.model == model
        assert whole.usage.completion_tokens > 3
        events = list(chat(server, model, prefix, stream=True, stream_options={"include_usage": True}))
        assert events[-1].usage == whole.usage
        streamed = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
        assert len(events) > 4
        answers += [whole.choices[0].message.content, streamed]
    assert len(set(answers)) == 1
    if model != "demo-squeezellm":  # which ends at its default stop
        assert "string" in answers[0]


@pytest.mark.parametrize("model", MODELS)
def test_completions_streaming_and_not(server: Server, model: str) -> None:
    ask = {"model": model, "prompt": "Return a copy of the", "max_tokens": 8, "temperature": 0}
    whole = server.client().completions.create(**ask)
    events = list(server.client().completions.create(**ask, stream=True))
    assert whole.choices[0].text
    assert "".join(event.choices[0].text for event in events) == whole.choices[0].text


def test_events_arrive_one_by_one(server: Server) -> None:
    """No timer gathers tokens: the first event is there long before the last."""
    ask = {"model": "demo-fp16", "messages": QUESTION, "max_tokens": 300, "stream": True, "ignore_eos": True}
    for prefix in ("", "/demo-fp16"):
        began = time.monotonic()
        times = []
        with httpx.stream(
            "POST",
            f"{server.base}{prefix}/v1/chat/completions",
            json=ask,
            headers={"authorization": f"Bearer {KEY}"},
            timeout=60,
        ) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            for line in response.iter_lines():
                if line:
                    times.append(time.monotonic() - began)
                    last = line
        assert last == "data: [DONE]"
        assert len(times) > 40  # on a busy machine vLLM puts several tokens into one event; a timer makes some ten
        assert times[1] < times[-1] / 2


def test_many_at_once(server: Server) -> None:
    def one(index: int) -> str:
        model = MODELS[index % 3]
        answer = chat(server, model, route(model) if index % 2 else "")
        return f"{model} {answer.choices[0].message.content}"

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(one, range(36)))
    assert len(set(answers)) == 3  # greedy: one answer a model, whatever runs beside it


def test_several_answers_with_seed_and_logprobs(server: Server) -> None:
    ask = {"n": 2, "seed": 7, "temperature": 1.0, "logprobs": True, "top_logprobs": 3, "max_tokens": 6}
    first, second = (chat(server, "demo-fp16", **ask) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(texts) == 2
    assert texts == [choice.message.content for choice in second.choices]
    tokens = first.choices[0].logprobs.content
    assert 0 < len(tokens) <= 6
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens)


def test_structured_output(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["method", "module"]}, "count": {"enum": [1, 2]}},
        "required": ["kind", "count"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer = chat(server, "demo-fp16", response_format=wanted, max_tokens=60)
    assert json.loads(answer.choices[0].message.content)["kind"] in ("method", "module")


def test_tool_call(server: Server) -> None:
    parameters = {"type": "object", "properties": {"unit": {"enum": ["s", "ms"]}}, "required": ["unit"]}
    tools = [{"type": "function", "function": {"name": "clock", "parameters": parameters, "strict": True}}]
    choice = {"type": "function", "function": {"name": "clock"}}
    # The penalty keeps a small model from writing blanks, which the grammar allows, to the end.
    answer = chat(server, "demo-fp16", tools=tools, tool_choice=choice, max_tokens=200, frequency_penalty=2)
    assert answer.choices[0].message.tool_calls, answer
    call = answer.choices[0].message.tool_calls[0].function
    assert call.name == "clock"
    assert json.loads(call.arguments)["unit"] in ("s", "ms")


def test_tokenize_and_detokenize(server: Server) -> None:
    for prefix in ("", "/demo-fp16"):
        asked = {"model": "demo-fp16", "prompt": "a string", "add_special_tokens": False}
        tokens = server.request("POST", prefix + "/tokenize", asked).json()["tokens"]
        answer = server.request("POST", prefix + "/detokenize", {"model": "demo-fp16", "tokens": tokens})
        assert answer.json()["prompt"] == "a string"


def test_request_defaults_count(server: Server) -> None:
    client = server.client()
    defaulted = client.chat.completions.create(model="demo-squeezellm", messages=QUESTION)
    again = client.chat.completions.create(model="demo-squeezellm", messages=QUESTION)
    assert defaulted.choices[0].message.content == again.choices[0].message.content  # temperature 0
    assert defaulted.usage
    assert defaulted.usage.completion_tokens <= 9
    longer = client.chat.completions.create(model="demo-squeezellm", messages=QUESTION, max_tokens=40, stop=["\n"])
    choice = longer.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content
    assert "method" not in choice.message.content
    assert getattr(choice, "stop_reason", None) == "method"  # the model's stop, united with the client's
    raw = server.request(
        "POST", "/v1/completions", {"model": "demo-squeezellm", "prompt": "Return", "max_tokens": None}
    )
    assert raw.json()["usage"]["completion_tokens"] <= 9
    other = client.chat.completions.create(model="demo-fp16", messages=QUESTION, temperature=0)
    assert other.usage
    assert other.usage.completion_tokens > 9


def test_models_say_what_they_are(server: Server) -> None:
    cards = server.request("GET", "/v1/models").json()["data"]
    assert [card["id"] for card in cards] == list(MODELS)
    assert [card["metadata"]["method"] for card in cards] == ["fp16", "awq", "squeezellm"]
    assert all(abs(card["created"] - time.time()) < 3600 and card["max_model_len"] == 512 for card in cards)
    assert all("expected_performance" in card["metadata"] for card in cards)
    assert cards[1]["metadata"]["description"] == "four bits"
    assert "examples" not in json.dumps(cards)  # no paths of this machine
    for path in ("/v1/models/org/demo-awq", "/v1/models/org--demo-awq", "/org--demo-awq/v1/models/org/demo-awq"):
        assert server.request("GET", path).json()["id"] == "org/demo-awq"
    assert server.client().models.retrieve("demo-fp16").id == "demo-fp16"


def test_health(server: Server) -> None:
    """Who has no key learns whether the server is well, and no names."""
    for headers in ({}, {"authorization": ""}, {"authorization": "Bearer wrong-key-123"}):
        answer = httpx.get(server.base + "/health", headers=headers, timeout=30)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    assert server.request("GET", "/health").json() == {"status": "ok", "models": dict.fromkeys(MODELS, "ok")}
    assert server.request("GET", "/org--demo-awq/health").json()["models"] == {"org/demo-awq": "ok"}
    assert httpx.get(server.base + "/org--demo-awq/health", timeout=30).status_code == 401  # the route names the model


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/demo-fp16/v1/models", "/demo-fp16/metrics"])
def test_keys_guard_both_routes(server: Server, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer wrong-key-123"}):
        answer = httpx.get(server.base + path, headers=headers, timeout=30)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.base + "/v1", api_key="wrong-key-123", max_retries=0).models.list()


GOOD = {"model": "demo-fp16", "messages": QUESTION, "max_tokens": 2}


@pytest.mark.parametrize(
    ("change", "param", "status", "said"),
    [
        ({"model": "demo-fp17"}, "model", 404, "Did you mean `demo-fp16`"),
        ({"temperature": -1}, "temperature", 400, "temperature"),
        ({"temperature": "hot"}, "temperature", 400, "temperature"),
        ({"top_p": 2}, "top_p", 400, "top_p"),
        ({"n": 0}, "n", 400, "n"),
        ({"max_tokens": 0}, "max_tokens", 400, "max_tokens"),
        ({"logprobs": False, "top_logprobs": 5}, "top_logprobs", 400, "logprobs"),
        ({"messages": []}, "messages", 400, ""),
        ({"messages": "hello"}, "messages", 400, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "messages", 400, "512"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}},
         "response_format.json_schema.schema", 400, ""),
        ({"stop": 7}, "stop", 400, "stop"),
        ({"seed": "x"}, "seed", 400, "seed"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "/demo-fp16"])
def test_mistakes_are_explained(
    server: Server, prefix: str, change: dict[str, Any], param: str | None, status: int, said: str
) -> None:
    answer = server.request("POST", prefix + "/v1/chat/completions", {**GOOD, **change})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert error["param"] == param
    assert error["code"] is None or re.fullmatch("[a-z_]+", error["code"])
    assert said in error["message"]
    assert "Traceback" not in answer.text
    assert server.request("POST", prefix + "/v1/chat/completions", GOOD).status_code == 200


@pytest.mark.parametrize(
    "item",
    [
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_file", "file_id": "f"}]},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_file"}]},
        {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": []},
    ],
    ids=["file", "no file", "nothing said"],
)
def test_an_item_that_vllm_does_not_expect(server: Server, item: dict[str, Any]) -> None:
    """An output of a function that is a file, and an answer without content (found by fuzzing)."""
    answer = server.request("POST", "/v1/responses", {"model": "demo-fp16", "input": [item], "max_output_tokens": 2})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert "assert" not in answer.text.lower()


def test_the_request_id_is_returned(server: Server) -> None:
    for prefix in ("", "/demo-fp16"):
        answer = server.request("POST", prefix + "/v1/chat/completions", GOOD, headers={"x-request-id": "mine-42"})
        assert answer.headers["x-request-id"] == "mine-42"
        assert "mine-42" in answer.json()["id"]


@pytest.mark.parametrize("prefix", ["", "/demo-fp16"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnected_client_frees_the_engine(server: Server, prefix: str, stream: bool) -> None:
    ask = {"model": "demo-fp16", "prompt": "x", "max_tokens": 480, "ignore_eos": True, "n": 8, "stream": stream}
    url = f"{server.base}{prefix}/v1/completions"
    headers = {"authorization": f"Bearer {KEY}"}
    made = metric(server, "demo-fp16", "vllm:generation_tokens_total")
    with httpx.Client(timeout=60, headers=headers) as client:
        if stream:
            with client.stream("POST", url, json=ask) as response:
                assert response.status_code == 200
                next(response.iter_raw())  # on a fast machine the gauge may miss the request, so it is not asked here
        else:
            with pytest.raises(httpx.TimeoutException):
                client.post(url, json=ask, timeout=0.7)
    until(lambda: metric(server, "demo-fp16", "vllm:num_requests_running") == 0)
    until(lambda: metric(server, "demo-fp16", "vllm:kv_cache_usage_perc") == 0)
    # Not because it had finished: of 8 times 480 tokens the most were never made.
    assert metric(server, "demo-fp16", "vllm:generation_tokens_total") - made < 8 * 480
