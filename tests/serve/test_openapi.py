"""The gateway's OpenAPI schema has the paths that clients reach at each address."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from starlette.types import Receive, Scope, Send

from quantserve.serve.gateway.metrics.collect import GatewayMetrics, MetricsEndpoint
from quantserve.serve.gateway.routing.router import Router, ServedModel

from .asgi_client import Answer, request

CHAT = {
    "title": "ChatCompletionRequest",
    "type": "object",
    "required": ["messages"],
    "properties": {"model": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "messages": {"type": "array"}},
}


def operation(body: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"responses": {"200": {"description": "Good"}, "422": {"description": "Not here"}}}
    if body:
        schema = {"$ref": f"#/components/schemas/{body}"}
        found["requestBody"] = {"content": {"application/json": {"schema": schema}}}
    return found


def schema(*paths: str) -> dict[str, Any]:
    return {
        "openapi": "3.1.0",
        "info": {"title": "FastAPI", "version": "0.1.0"},
        "paths": {path: {"post": operation("Chat")} for path in paths} | {"/version": {"get": operation()}},
        "components": {"schemas": {"Chat": CHAT}},
    }


class Described:
    """A model's server that gives its schema."""

    def __init__(self, schema: dict[str, Any], status: int = 200) -> None:
        self.schema, self.status, self.asked = schema, status, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(self.schema).encode()})


def model(name: str, app: Any, up: bool = True) -> ServedModel:
    async def healthy() -> bool:
        return up

    return ServedModel({"id": name, "object": "model"}, app, healthy, f"/{name}")


def ask(router: Router, path: str = "/openapi.json") -> Answer:
    return asyncio.run(request(router, "GET", path))


def router(*models: ServedModel) -> Router:
    return Router(models, MetricsEndpoint(GatewayMetrics([dict(one.card) for one in models], list)))


def test_several_models() -> None:
    chat, embed = Described(schema("/v1/chat/completions")), Described(schema("/v1/embeddings"))
    front = router(model("chat", chat), model("embed", embed))
    answer = ask(front)
    assert answer.headers["content-type"] == "application/json"
    found = answer.json
    own = {"/health", "/v1/models", "/v1/models/{model}", "/metrics"}
    assert set(found["paths"]) == {"/v1/chat/completions", "/v1/embeddings", *own}  # a GET finds no model
    assert set(found["paths"]["/v1/embeddings"]["post"]["responses"]) == {"200", "4XX", "5XX"}
    body = found["components"]["schemas"]["Chat"]
    assert body["properties"]["model"]["enum"] == ["chat", "embed"]
    assert body["required"] == ["messages", "model"]
    assert found["security"] == [{"key": []}, {}]
    assert ask(front).body == answer.body


def test_the_schema_of_errors_fits_errors() -> None:
    front = router(model("chat", Described(schema("/v1/chat/completions"))))
    error = Draft202012Validator(ask(front).json["components"]["schemas"]["Error"])
    refused = asyncio.run(request(front, "POST", "/v1/chat/completions", {"model": "other"}))
    assert refused.status == 404
    error.validate(refused.json)
    assert not error.is_valid({"error": {"message": "x"}})


def test_one_model_and_own_routes() -> None:
    chat, embed = Described(schema("/v1/chat/completions")), Described(schema("/v1/embeddings"))
    only = ask(router(model("chat", chat))).json
    assert {"/v1/chat/completions", "/version", "/health", "/metrics"} <= set(only["paths"])
    assert only["components"]["schemas"]["Chat"]["required"] == ["messages"]
    assert "servers" not in only
    mine = ask(router(model("chat", chat), model("embed", embed)), "/embed/openapi.json").json
    assert {"/v1/embeddings", "/version"} <= set(mine["paths"])
    assert not {"/v1/chat/completions", "/metrics"} & set(mine["paths"])
    assert mine["servers"] == [{"url": "/embed"}]
    assert mine["components"]["schemas"]["Chat"]["properties"]["model"]["enum"] == ["embed"]


def test_models_that_are_down_are_not_asked() -> None:
    chat, embed = Described(schema("/v1/chat/completions")), Described(schema("/v1/embeddings"))
    front = router(model("chat", chat), model("embed", embed, up=False))
    assert "/v1/embeddings" not in ask(front).json["paths"]
    assert embed.asked == 0
    nobody = ask(router(model("chat", chat, up=False)))
    assert (nobody.status, nobody.error["code"]) == (503, "model_unavailable")


@pytest.mark.parametrize("status", [404, 503])
def test_a_server_without_a_schema(status: int) -> None:
    front = router(model("chat", Described({}, status)), model("embed", Described(schema("/v1/embeddings"))))
    assert "/v1/embeddings" in ask(front).json["paths"]
    assert ask(router(model("chat", Described({}, status)))).status in (404, 503)


def test_closed_paths_are_neither_shown_nor_reached() -> None:
    chat = Described(schema("/v1/chat/completions", "/scale_elastic_ep"))
    front = router(model("chat", chat), model("other", Described(schema("/v1/chat/completions"))))
    assert "/scale_elastic_ep" not in ask(front, "/chat/openapi.json").json["paths"]
    asked = chat.asked
    for path in ("/chat/scale_elastic_ep", "/scale_elastic_ep", "/scale_elastic_ep/"):
        answer = asyncio.run(request(front, "POST", path, {"model": "chat", "new_data_parallel_size": 2}))
        assert (answer.status, answer.error["code"]) == (404, "unknown_url")
    assert chat.asked == asked


def test_a_new_schema_is_taken_over() -> None:
    chat = Described(schema("/v1/chat/completions"))
    front = router(model("chat", chat))
    assert "/v1/messages" not in ask(front).json["paths"]
    chat.schema = schema("/v1/chat/completions", "/v1/messages", "/v1/new")
    assert "/v1/messages" in ask(front).json["paths"]
    assert "/v1/new" not in ask(front).json["paths"]


def test_requests_for_the_schema_ask_each_model_once_per_interval() -> None:
    chat = Described(schema("/v1/chat/completions"))
    front = Router([model("chat", chat)], health_cache_s=60)

    async def many() -> None:
        await asyncio.gather(*(request(front, "GET", "/openapi.json") for _ in range(20)))
        await request(front, "GET", "/openapi.json")

    asyncio.run(many())
    assert chat.asked == 1
