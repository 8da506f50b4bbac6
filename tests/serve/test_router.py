"""The gateway's router: every request reaches its model or gets one clear error."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from quantserve.serve.gateway.routing.router import Router, ServedModel

from .asgi_client import Answer, Upstream, request

IDS = ("demo-fp16", "org/model-awq")


def model(upstream: Any, model_id: str, aliases: tuple[str, ...] = ()) -> ServedModel:
    card = {"id": model_id, "object": "model", "created": 1700000000, "owned_by": "quantserve", "parent": None}

    async def healthy() -> bool:
        return bool(getattr(upstream, "healthy", False))

    return ServedModel(card, upstream, healthy, "/" + model_id.replace("/", "--"), aliases)


@pytest.fixture
def upstreams() -> dict[str, Upstream]:
    return {name: Upstream(name) for name in IDS}


@pytest.fixture
def router(upstreams: dict[str, Upstream]) -> Router:
    return Router([model(upstream, name) for name, upstream in upstreams.items()])


def ask(app: Any, method: str, path: str, body: object = None, **kwargs: Any) -> Answer:
    return asyncio.run(request(app, method, path, body, **kwargs))


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/rerank"])
def test_routes_by_model(router: Router, upstreams: dict[str, Upstream], name: str, path: str) -> None:
    body = json.dumps({"model": name, "é": "ü"}, ensure_ascii=False).encode()
    answer = ask(router, "POST", path, body, parts=3)
    assert (answer.status, answer.json, answer.headers["x-upstream"]) == (200, {"from": name}, name)
    assert upstreams[name].bodies == [body]  # byte for byte
    assert upstreams[name].paths == [path]


def test_own_route_inside_one_application(router: Router, upstreams: dict[str, Upstream]) -> None:
    answer = ask(router, "POST", "/org--model-awq/v1/completions", {"prompt": "x"})
    assert answer.json == {"from": "org/model-awq"}
    assert upstreams["org/model-awq"].paths == ["/v1/completions"]
    assert ask(router, "GET", "/org--model-awq/metrics").json == {"from": "org/model-awq"}
    assert [card["id"] for card in ask(router, "GET", "/org--model-awq/v1/models").json["data"]] == ["org/model-awq"]
    refused = ask(router, "POST", "/org--model-awq/v1/completions", {"model": "demo-fp16", "prompt": "x"})
    assert refused.status == 404
    assert "`org/model-awq`" in refused.error["message"]
    assert "Available models: `org/model-awq`." in refused.error["message"]


@pytest.mark.parametrize(
    ("body", "status", "code", "param", "said"),
    [
        ({"model": "demo-fp32"}, 404, "model_not_found", "model", "does not exist. Did you mean `demo-fp16`?"),
        ({"model": "x"}, 404, "model_not_found", "model", "Available models: `demo-fp16`, `org/model-awq`."),
        ({"model": "Demo-FP16"}, 404, "model_not_found", "model", "does not exist"),
        ({"model": 7}, 400, "invalid_type", "model", "must be a string"),
        ({"model": ["demo-fp16"]}, 400, "invalid_type", "model", "must be a string"),
        ({"model": None}, 400, "missing_model", "model", "`demo-fp16`, `org/model-awq`"),
        ({}, 400, "missing_model", "model", "`demo-fp16`, `org/model-awq`"),
        ([], 400, "invalid_json", None, "must be a JSON object"),
        (b"", 400, "missing_model", "model", "`model` is missing"),
        (b"{", 400, "invalid_json", None, "line 1 column 2"),
        (b"\xff\xfe\xff", 400, "invalid_json", None, "not valid JSON"),
        (b"[" * 200_000, 400, "invalid_json", None, "not valid JSON"),
        (b'{"model": ' + b"9" * 5000 + b"}", 400, "invalid_json", None, "not valid JSON"),
    ],
)
def test_mistakes(router: Router, body: object, status: int, code: str, param: str | None, said: str) -> None:
    answer = ask(router, "POST", "/v1/chat/completions", body)
    assert answer.status == status
    assert answer.headers["content-type"] == "application/json"
    assert (answer.error["code"], answer.error["param"]) == (code, param)
    assert said in answer.error["message"]
    assert "Traceback" not in answer.error["message"]


def test_long_name_is_not_echoed(router: Router) -> None:
    assert len(ask(router, "POST", "/v1/completions", {"model": "m" * 100_000}).body) < 1000


def test_not_json(router: Router) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = ask(router, "POST", "/v1/audio/transcriptions", b"--x", headers=headers)
    assert answer.status == 415
    assert answer.error["message"] == (
        "Content-Type: multipart/form-data; boundary=x is not supported here; send application/json. This server hosts "
        "several models: a body other than JSON needs a model's route, e.g. /demo-fp16/v1."
    )


@pytest.mark.parametrize("path", ["/metrics", "/v1/chat/completions", "/v1/responses/7"])
def test_paths_of_one_model_need_its_prefix(router: Router, path: str) -> None:
    answer = ask(router, "GET", path)
    assert (answer.status, answer.error["code"]) == (404, "unknown_url")
    prefixed = f"model-specific paths need a prefix, e.g. /demo-fp16{path}."
    assert answer.error["message"] == f"Unknown path {path}. This server hosts several models; {prefixed}"


@pytest.mark.parametrize("path", ["/v1", "/nothing", "/docs", "/redoc", "/demo-fp16/nothing", "/static/x"])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS"])
def test_unknown_path(router: Router, upstreams: dict[str, Upstream], method: str, path: str) -> None:
    answer = ask(router, method, path, {"model": "demo-fp16"} if method == "POST" else None)
    assert (answer.status, answer.error["code"]) == (404, "unknown_url")
    shown = path.removeprefix("/demo-fp16")
    assert answer.error["message"] == f"Unknown path {shown}. GET /openapi.json lists the paths."
    assert not any(upstream.bodies for upstream in upstreams.values())


def test_every_target_has_an_answer(router: Router) -> None:
    answer = ask(router, "OPTIONS", "*")
    assert (answer.status, answer.headers["allow"]) == (204, "GET, HEAD, POST, OPTIONS")
    for path in ("*", "", "x", "//", "/..", "/%00", "http://x/y"):
        for method in ("GET", "OPTIONS", "POST", "CONNECT", "TRACE", "X"):
            assert ask(router, method, path, {"model": "x"}).status < 500


def test_the_overview(router: Router) -> None:
    for path in ("/", "//"):
        assert ask(router, "GET", path).json == {
            "name": "quantserve", "api": "OpenAI-compatible",
            "models": "/v1/models", "health": "/health", "schema": "/openapi.json",
        }  # fmt: skip
    assert ask(router, "GET", "/demo-fp16").json["models"] == "/demo-fp16/v1/models"
    assert ask(router, "POST", "/").status == 405


@pytest.mark.parametrize("path", ["/v1/completions/", "//v1/completions", "/demo-fp16//v1/completions//"])
def test_slashes_too_many_are_removed(path: str) -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"])
        await Upstream("m")(scope, receive, send)

    assert ask(Router([model(app, "demo-fp16")]), "POST", path, {"prompt": "x"}).status == 200
    assert seen == ["/v1/completions"]


@pytest.mark.parametrize(
    "path",
    ["/sleep", "/v1/../sleep", "/v1/responses/../../sleep", "/SLEEP", "/sleep;x", "/./sleep", "/v1/responses/x/y",
     "/%73leep", "/sleep/", "//sleep", "/sleep%2f", "/v1/load_lora_adapter", "/inference/v1/generate", "/adapters/x",
     "/v1/chat/completions;x", "/v1/Completions", "/v1/completions\n", "/v1/completions?"],
)  # fmt: skip
def test_other_spellings_of_closed_paths_are_closed(path: str) -> None:
    upstream = Upstream("only")
    router = Router([model(upstream, "only")])
    for prefix in ("", "/only"):
        for method in ("GET", "POST"):
            answer = ask(router, method, prefix + path, {} if method == "POST" else None)
            assert (answer.status, answer.error["code"]) == (404, "unknown_url")
    assert upstream.bodies == []


def test_health_checks_are_shared() -> None:
    asked = []

    async def healthy() -> bool:
        asked.append(1)
        await asyncio.sleep(0.01)
        return True

    served = [ServedModel({"id": name}, Upstream(name), healthy, f"/{name}") for name in ("a", "b")]
    router = Router(served, health_cache_s=60)

    async def many() -> None:
        paths = ["/health", "/a/health", "/b/health"] * 10
        answers = await asyncio.gather(*(request(router, method, path) for path in paths for method in ("GET", "HEAD")))
        answers += [await request(router, "GET", "/health") for _ in range(5)]
        assert {answer.status for answer in answers} == {200}

    asyncio.run(many())
    assert len(asked) == 2  # once for each model


def test_a_health_check_outlives_the_client_that_asked_first() -> None:
    async def work() -> None:
        go = asyncio.Event()

        async def healthy() -> bool:
            await go.wait()
            return True

        router = Router([ServedModel({"id": "a"}, Upstream("a"), healthy, "/a")], health_cache_s=60)
        first = asyncio.create_task(request(router, "GET", "/health"))
        await asyncio.sleep(0)
        second = asyncio.create_task(request(router, "GET", "/health"))
        await asyncio.sleep(0.01)
        first.cancel()
        go.set()
        assert (await second).status == 200

    asyncio.run(work())


def test_models(router: Router) -> None:
    for path in ("/v1/models", "/v1/models/"):
        listed = ask(router, "GET", path).json
        assert listed["object"] == "list"
        assert [card["id"] for card in listed["data"]] == list(IDS)
        assert all(isinstance(card["created"], int) for card in listed["data"])


@pytest.mark.parametrize("name", ["demo-fp16", "org/model-awq", "org--model-awq", "org%2Fmodel-awq"])
def test_one_model(router: Router, name: str) -> None:
    answer = ask(router, "GET", f"/v1/models/{name}")
    assert answer.status == 200
    assert answer.json["id"] in IDS


def test_id_with_dashes_is_found_as_it_is() -> None:
    router = Router([model(Upstream("a"), "a--b"), model(Upstream("b"), "b")])
    assert ask(router, "GET", "/v1/models/a--b").json["id"] == "a--b"


def test_unknown_and_unsupported_model_requests(router: Router) -> None:
    assert ask(router, "GET", "/v1/models/nope").error["code"] == "model_not_found"
    answer = ask(router, "DELETE", "/v1/models/demo-fp16")
    assert (answer.status, answer.headers["allow"]) == (405, "GET")


def test_health_is_per_model(upstreams: dict[str, Upstream], router: Router) -> None:
    answer = ask(router, "GET", "/health")
    assert (answer.status, answer.json["status"]) == (200, "ok")
    upstreams["demo-fp16"].healthy = False
    answer = ask(router, "GET", "/health")
    expected = {"status": "degraded", "models": {"demo-fp16": "unavailable", "org/model-awq": "ok"}}
    assert (answer.status, answer.json) == (503, expected)
    assert ask(router, "GET", "/org--model-awq/health").status == 200
    assert ask(router, "GET", "/demo-fp16/health").status == 503


def test_a_raising_upstream_is_a_500_without_details() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("secret /etc/path")

    router = Router([model(broken, "a"), model(Upstream("b"), "b")])
    assert ask(router, "GET", "/health").json["models"] == {"a": "unavailable", "b": "ok"}
    answer = ask(router, "POST", "/v1/completions", {"model": "a"})
    assert answer.status == 500
    assert answer.error["type"] == "server_error"
    assert "secret" not in answer.body.decode()


def test_a_single_model_gets_every_path() -> None:
    upstream = Upstream("only")
    router = Router([model(upstream, "only", aliases=("adapter",))])
    assert ask(router, "POST", "/v1/chat/completions", {"messages": []}).json == {"from": "only"}
    assert ask(router, "POST", "/v1/chat/completions", {"model": "adapter"}).json == {"from": "only"}
    assert ask(router, "POST", "/only/v1/chat/completions", {"model": "only"}).json == {"from": "only"}
    assert ask(router, "GET", "/metrics").json == {"from": "only"}
    assert ask(router, "POST", "/v1/chat/completions", {"model": "other"}).error["code"] == "model_not_found"
    assert ask(router, "GET", "/health").json == {"status": "ok", "models": {"only": "ok"}}
    cards = ask(router, "GET", "/v1/models").json["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [("only", None), ("adapter", "only")]


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "PROPFIND"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/only/v1/responses/7"])
def test_other_methods_take_no_place_in_the_queue(method: str, path: str) -> None:
    """The limit per key counts POST requests."""
    upstream = Upstream("only")
    answer = ask(Router([model(upstream, "only")]), method, path, {"model": "only"})
    assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, HEAD, POST"
    assert upstream.bodies == []


@pytest.mark.parametrize("path", ["/v1/responses/7/cancel", "/only/v1/responses/7/cancel", "/only/ping"])
def test_requests_without_a_body_are_forwarded(path: str) -> None:
    """OpenAI's clients send none to cancel a response."""
    router = Router([model(Upstream("only"), "only")])
    for headers in ({}, {"content-type": "application/json"}):
        assert ask(router, "POST", path, b"", headers=headers).json == {"from": "only"}


@pytest.mark.parametrize("path", ["/v1/models", "/only/v1/models"])
def test_mounted_under_a_prefix(path: str) -> None:
    """Ray Serve's proxies differ in whether the prefix is still in the path."""
    router = Router([model(Upstream("only"), "only")])
    assert ask(router, "GET", path, root_path="/only").json["data"][0]["id"] == "only"
