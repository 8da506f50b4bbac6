"""Wrong values in every field of vLLM's request types: status 400, with the path of that field in the client's body."""

from __future__ import annotations

import asyncio
import copy
import pkgutil
import re
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI

from quantserve.serve.replica.vllm.envelope import Envelope, install

from .asgi_client import Answer, request

pytestmark = pytest.mark.vllm

TYPES = {
    "/v1/chat/completions": "openai.chat_completion.protocol:ChatCompletionRequest",
    "/v1/chat/completions/batch": "openai.chat_completion.protocol:BatchChatCompletionRequest",
    "/v1/completions": "openai.completion.protocol:CompletionRequest",
    "/v1/responses": "openai.responses.protocol:ResponsesRequest",
    "/v1/messages": "anthropic.protocol:AnthropicMessagesRequest",
    "/v1/messages/count_tokens": "anthropic.protocol:AnthropicCountTokensRequest",
    "/tokenize": "serve.tokenize.protocol:TokenizeRequest",
    "/detokenize": "serve.tokenize.protocol:DetokenizeRequest",
    "/v1/embeddings": "pooling.embed.protocol:EmbeddingRequest",
    "/classify": "pooling.classify.protocol:ClassificationRequest",
    "/score": "pooling.scoring.protocol:ScoreRequest",
    "/rerank": "pooling.scoring.protocol:RerankRequest",
    "/pooling": "pooling.pooling.protocol:PoolingRequest",
}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/chat/completions/batch": {"messages": [[{"role": "user", "content": "Hi"}]]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"model": "m", "max_tokens": 3, "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/messages/count_tokens": {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1]},
    "/v1/embeddings": {"input": "Hi"},
    "/classify": {"input": "Hi"},
    "/score": {"text_1": "a", "text_2": "b"},
    "/rerank": {"query": "a", "documents": ["b"]},
    "/pooling": {"input": "Hi"},
}
SECRET = "sesame-" * 100
WRONG: tuple[Any, ...] = (-7, SECRET, {"odd": SECRET}, [{"odd": SECRET}])
DEPTH = 9
INTERNAL = re.compile(
    r"pydantic|function-|union\[|tagged-union|ValidatorIterator|\bvllm\.|Traceback|instance of|"
    r"\b(?:[A-Z][a-z]+){2,}(?:Param|Request|Message|Tool|Item|Format|Output|Call|Input|Content)\b"
)


@cache
def schema(path: str) -> dict[str, Any]:
    """The JSON schema of a request type."""
    from pydantic import TypeAdapter

    return TypeAdapter(pkgutil.resolve_name(f"vllm.entrypoints.{TYPES[path]}")).json_schema()


@pytest.fixture(scope="module")
def app() -> FastAPI:
    """Routes with vLLM's request types that read what vLLM's routes read, and nothing else."""
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

    made = FastAPI()
    made.state.args = SimpleNamespace(log_error_stack=False)
    init_exception_handler(made)
    for path, name in TYPES.items():

        async def route(body: Any) -> dict[str, bool]:
            read(body)
            return {"accepted": True}

        route.__annotations__["body"] = pkgutil.resolve_name(f"vllm.entrypoints.{name}")
        made.post(path)(route)
    install(made)
    return made


def read(value: Any) -> None:
    """Read all of a parsed request, as the validation of iterables happens then."""
    if type(value).__name__ == "ValidatorIterator":
        for part in value:
            read(part)
    elif isinstance(value, dict):
        for part in value.values():
            read(part)
    elif isinstance(value, list):
        for part in value:
            read(part)
    elif hasattr(type(value), "model_fields"):
        read(vars(value))


def resolved(node: Any, root: dict[str, Any]) -> dict[str, Any]:
    while isinstance(node, dict) and "$ref" in node:
        node = root["$defs"][node["$ref"].rpartition("/")[2]]
    return node if isinstance(node, dict) else {}


def sample(node: Any, root: dict[str, Any], depth: int = 0) -> Any:
    """A small value that fits a schema."""
    node = resolved(node, root)
    if "const" in node:
        return node["const"]
    if "enum" in node:
        return node["enum"][0]
    for kind in ("anyOf", "oneOf", "allOf"):
        if options := [option for option in node.get(kind, ()) if option.get("type") != "null"]:
            return sample(options[0], root, depth + 1)
    match node.get("type"):
        case "object":
            required = node.get("required", ()) if depth < DEPTH else ()
            return {name: sample(node["properties"][name], root, depth + 1) for name in required}
        case "array":
            return [sample(node.get("items", {}), root, depth + 1)] if depth < DEPTH else []
        case "integer" | "number":
            return max(1, node.get("minimum", 1))
        case "boolean":
            return True
        case "null":
            return None
    return "text"


Spot = tuple[tuple[str | int, ...], Any]


def spots(node: Any, root: dict[str, Any], seen: frozenset[str] = frozenset()) -> Iterator[Spot]:
    """For every field below a schema: its path and a good value that has that path."""
    if isinstance(node, dict) and "$ref" in node:
        if node["$ref"] in seen:
            return
        seen = seen | {node["$ref"]}
    node = resolved(node, root)
    for kind in ("anyOf", "oneOf", "allOf"):
        for option in node.get(kind, ()):
            yield from spots(option, root, seen)
    if node.get("type") == "array" and isinstance(node.get("items"), dict):
        yield (0,), [sample(node["items"], root)]
        yield from (((0, *path), [value]) for path, value in spots(node["items"], root, seen))
    whole = sample(node, root) if node.get("properties") else {}
    for name, part in (node.get("properties") or {}).items():
        yield (name,), {**whole, name: sample(part, root)}
        yield from (((name, *path), {**whole, name: value}) for path, value in spots(part, root, seen))


def broken(path: str, accepts: Callable[[Any], bool]) -> Iterator[tuple[tuple[str | int, ...], dict[str, Any]]]:
    """Bodies with one wrong value, and the path to it."""
    done = set()
    for place, value in spots(schema(path), schema(path)):
        good = copy.deepcopy(GOOD[path] | value)
        if not accepts(good):
            continue
        for wrong in WRONG:
            body = copy.deepcopy(good)
            inner: Any = body
            for part in place[:-1]:
                inner = inner[part]
            inner[place[-1]] = copy.deepcopy(wrong)
            if (key := repr((place, body))) not in done:
                done.add(key)
                yield place, body
        if place and isinstance(place[-1], str):
            body = copy.deepcopy(good)
            inner = body
            for part in place[:-1]:
                inner = inner[part]
            del inner[place[-1]]
            yield place, body


def parts_of(param: str) -> tuple[str | int, ...]:
    found = re.findall(r"([^.\[\]]+)|\[(\d+)\]", param)
    return tuple(name or int(index) for name, index in found)


def exists(path: tuple[str | int, ...], body: Any, missing: bool) -> bool:
    for index, part in enumerate(path):
        try:
            body = body[part]
        except (LookupError, TypeError):
            return missing and index == len(path) - 1
    return True


def fault(place: tuple[str | int, ...], body: dict[str, Any], answer: Answer) -> str:
    """What is wrong with an answer to a wrong value."""
    if answer.status == 200:
        return ""
    if answer.status != 400:
        return f"status {answer.status}"
    error = answer.error
    if match := INTERNAL.search(error["message"]):
        return f"names {match[0]}"
    if len(error["message"]) > 1100 or error["message"].count("sesame") > 300 // 7 * 3:
        return "repeats the input"
    if error["param"] is None:
        return "" if error["code"] == "invalid_value" else "no param"
    param = parts_of(error["param"])
    if not exists(param, body, error["code"] == "missing_required_parameter" or len(param) == 1):
        return "param is not in the body"
    common = min(len(param), len(place))
    if (
        param[:common] != place[:common]
        and error["code"] != "missing_required_parameter"
        and str(place[0]) not in error["message"]
    ):
        return "param is another field"
    return ""


@pytest.mark.parametrize("path", TYPES)
def test_errors_name_the_wrong_field(app: FastAPI, path: str) -> None:
    from pydantic import TypeAdapter

    adapter = TypeAdapter(pkgutil.resolve_name(f"vllm.entrypoints.{TYPES[path]}"))

    def accepts(body: Any) -> bool:
        try:
            read(adapter.validate_python(copy.deepcopy(body)))
        except Exception:
            return False
        return True

    async def run() -> tuple[int, list[str]]:
        refused, faults = 0, []
        served = Envelope(app)
        for place, body in broken(path, accepts):
            answer = await request(served, "POST", path, body)
            refused += answer.status == 400
            if found := fault(place, body, answer):
                faults.append(f"{found}: {place}: {answer.body[:300]!r}")
        return refused, faults

    refused, faults = asyncio.run(run())
    print(f"{path}: {refused} refused")
    assert refused > 10
    assert not faults, f"{len(faults)} faults:\n" + "\n".join(faults[:40])


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("path", "body", "param", "text"),
    [
        ("/v1/chat/completions",
         {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [CALL]}]},
         "messages[1].tool_calls[0].function.arguments", "must be a string"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]},
         "messages[0].content[0].text", "must be a string"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [7]}]},
         "messages[0].content[0]", "must be an object"),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": "none"}]},
         "messages[0].tool_calls", "must be a list"),
        ("/v1/completions", {"prompt": [1, "x", 2.5]}, "prompt[1]", "must be an integer"),
        ("/v1/chat/completions", {"messages": [], "repetition_detection": {"max_pattern_size": -1}},
         "repetition_detection.max_pattern_size", "must be >=0"),
    ],
)  # fmt: skip
def test_errors_below_lists_have_the_whole_path(
    app: FastAPI, path: str, body: dict[str, Any], param: str, text: str
) -> None:
    error = asyncio.run(request(Envelope(app), "POST", path, body)).error
    assert error["param"] == param, error
    assert text in error["message"]
