"""The HTTP API fuzzed from its own OpenAPI schema: nothing a client sends makes a 5xx, a hang or an odd error.

A minute of requests and more. docs/operations.md has the command that does the same with schemathesis.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ..server import KEY, Server, engines, until
from .conftest import MODELS

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

SECONDS: Final = 5.0
"""Of each test; examples after that pass unsent."""
ANSWER_S: Final = 30.0
EXAMPLES: Final = 400
PATHS: Final = (
    "/v1/chat/completions",
    "/v1/completions",
    "/tokenize",
    "/detokenize",
    "/v1/responses",
    "/v1/messages",
)
NOT_OF_THESE: Final = ("/v1/embeddings", "/v1/rerank", "/nothing")
"""Paths that these models do not have."""
BASES: Final[dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
    "/v1/completions": {"prompt": "Return", "max_tokens": 3},
    "/tokenize": {"prompt": "Return"},
    "/detokenize": {"tokens": [1, 2, 3]},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 3},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
}
HEAVY: Final = {"use_beam_search": False, "vllm_xargs": None}
"""Fixed values of fields that are known to be slow."""
REVEALING: Final = ("Traceback", 'File "/', "site-packages", "pydantic", "EngineCore", "vllm.")

TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "\0", "\ud800", "a" * 5000, "%s{0}", "../..", "auto", "none", "json_object", "text", "<|x|>"]),
)
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, -(2**31), 2**63, 2**64, -(2**64), 10**30, 1e308, -1e308, 5e-324, 0.5, float("nan"), 1e400]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)


class Fuzzer:
    """Sends to one server and judges what comes back.

    Attributes:
        schema: the OpenAPI schema the server gives of itself.
        sent: how many requests have been answered, by status.
    """

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        answer = self.client.get("/openapi.json")
        assert answer.status_code == 200
        self.schema: dict[str, Any] = answer.json()
        self.sent: dict[int, int] = {}

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> httpx.Response:
        """One request; fails on a 5xx, a hang, an error outside the envelope, and on what an error gives away."""
        given = {"content-type": "application/json"} | {key.replace("_", "-"): value for key, value in headers.items()}
        what = f"{method} {path} {given} {body!r}"
        try:
            answer = self.client.request(method, path, content=body, headers=given)
        except httpx.TimeoutException as error:
            raise AssertionError(f"no answer in {ANSWER_S:g} s: {what}") from error
        self.sent[answer.status_code] = self.sent.get(answer.status_code, 0) + 1
        assert answer.status_code < 500, f"{answer.status_code} {answer.text}: {what}"
        assert answer.headers["x-request-id"]
        if answer.status_code >= 400 and method != "HEAD":
            self._envelope(answer, what)
        elif answer.headers.get("content-type", "").startswith("text/event-stream"):
            for line in answer.text.splitlines():
                assert not line.startswith('data: {"error"') or '"code": 4' in line or "invalid" in line, what
        return answer

    @staticmethod
    def _envelope(answer: httpx.Response, what: str) -> None:
        said = f"{answer.status_code} {answer.text[:500]}: {what}"
        assert answer.headers["content-type"] == "application/json", said
        found = answer.json()
        assert list(found) == ["error"], said
        error = found["error"]
        assert set(error) == {"message", "type", "param", "code"}, said
        assert error["message"], said
        assert isinstance(error["type"], str), said
        assert error["param"] is None or isinstance(error["param"], str), said
        assert error["code"] is None or isinstance(error["code"], str), said
        assert not any(word in error["message"] for word in REVEALING), said

    def body_of(self, path: str) -> dict[str, Any]:
        """The schema of a path's request body."""
        content = self.schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        return dict(content["schema"])

    def strategy(self, schema: Any, depth: int = 0) -> st.SearchStrategy[Any]:
        """Values that fit a schema more or less, now and then not at all."""
        if not isinstance(schema, dict) or depth > 5:
            return SCALARS
        return st.one_of(self._fitting(schema, depth), self._fitting(schema, depth), ANYTHING)

    def _fitting(self, schema: dict[str, Any], depth: int) -> st.SearchStrategy[Any]:
        if name := schema.get("$ref"):
            return self._fitting(self.schema["components"]["schemas"][name.rpartition("/")[2]], depth)
        if "const" in schema:
            return st.just(schema["const"])
        if "enum" in schema:
            return st.sampled_from(schema["enum"])
        for kind in ("anyOf", "oneOf", "allOf"):
            if options := schema.get(kind):
                return st.one_of([self._fitting(option, depth + 1) for option in options])
        match schema.get("type"):
            case "object" if schema.get("properties"):
                return self.object(schema, depth)
            case "object":
                return st.dictionaries(TEXTS, SCALARS, max_size=3)
            case "array":
                return st.lists(self.strategy(schema.get("items"), depth + 1), max_size=3)
            case "string":
                return TEXTS
            case "integer" | "number":
                return NUMBERS
            case "boolean":
                return st.booleans()
            case "null":
                return st.none()
        return ANYTHING

    def object(self, schema: dict[str, Any], depth: int) -> st.SearchStrategy[dict[str, Any]]:
        """An object with its required fields and a few of the others."""
        properties: dict[str, Any] = schema["properties"]
        required = [name for name in schema.get("required", ()) if name in properties]
        some = st.lists(st.sampled_from(sorted(properties)), max_size=3 if depth == 0 else 2, unique=True)

        def chosen(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
            kept = dict.fromkeys([*required, *names])
            return st.fixed_dictionaries({name: self.strategy(properties[name], depth + 1) for name in kept})

        return some.flatmap(chosen)


def pids(server: Server, model: str) -> list[int]:
    """The processes of a model's engine."""
    found = [process.pid for process in engines(server, model.replace("/", "--"))]
    assert found
    return found


@pytest.fixture(scope="module")
def fuzzer(server: Server) -> Iterator[Fuzzer]:
    """A fuzzer; at the end every model answers still, from the engines it had at the beginning."""
    before = {name: pids(server, name) for name in MODELS}
    with httpx.Client(base_url=server.base, timeout=ANSWER_S, headers={"authorization": f"Bearer {KEY}"}) as client:
        made = Fuzzer(client)
        yield made
        until(lambda: client.get("/health").status_code == 200)
        for name in MODELS:
            ask = {"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
            assert client.post("/v1/chat/completions", json=ask).status_code == 200
            assert pids(server, name) == before[name]
    print(f"answers by status: {dict(sorted(made.sent.items()))}")
    assert made.sent[200] > 20, "hardly anything was let through, so hardly anything was tested"


def fuzz(**strategies: Any) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """`given` without shrinking that takes longer than the search, and the same examples in every run."""
    quiet = settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: quiet(given(**strategies)(test))


class Budget:
    """Whether there is time for another example."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._end = time.monotonic() + seconds

    def __bool__(self) -> bool:
        return time.monotonic() < self._end


def encoded(body: object) -> bytes:
    """JSON as other languages may write it, NaN and lone surrogates included."""
    return json.dumps(body, ensure_ascii=True).encode()


@pytest.mark.parametrize("path", PATHS)
def test_bodies_from_the_schema(fuzzer: Fuzzer, path: str) -> None:
    left = Budget()
    whole = fuzzer.strategy(fuzzer.body_of(path))

    @fuzz(body=whole, model=st.sampled_from(MODELS))
    def run(body: Any, model: str) -> None:
        if left:
            known = {"model": model} if isinstance(body, dict) and body.get("model") not in MODELS else {}
            small = {key: value for key, value in BASES[path].items() if "max_" in key}
            fuzzer.send("POST", path, encoded({**body, **known, **small, **HEAVY} if isinstance(body, dict) else body))

    run()


@pytest.mark.parametrize("path", PATHS)
def test_one_field_of_a_good_request_is_wrong(fuzzer: Fuzzer, path: str) -> None:
    left = Budget()
    schema = fuzzer.body_of(path)
    for option in (schema, *schema.get("anyOf", ())):
        if "$ref" in option:
            schema = fuzzer.schema["components"]["schemas"][option["$ref"].rpartition("/")[2]]
            break
    fields = sorted(set(schema["properties"]) - set(HEAVY))
    changes = st.sampled_from(fields).flatmap(
        lambda name: st.tuples(st.just(name), fuzzer.strategy(schema["properties"][name]))
    )

    @fuzz(change=changes, model=st.sampled_from(MODELS))
    def run(change: tuple[str, Any], model: str) -> None:
        if left:
            fuzzer.send("POST", path, encoded({"model": model, **BASES[path], **dict([change])}))

    run()


def test_bytes_and_headers(fuzzer: Fuzzer) -> None:
    left = Budget()
    types = ["application/json", "text/plain", "multipart/form-data", "application/json; charset=utf-16", "x", ""]
    bodies = st.one_of(st.binary(max_size=60), ANYTHING.map(encoded), st.just(b"[" * 3000), st.just(b'{"model":'))

    @fuzz(
        path=st.sampled_from(PATHS),
        body=bodies,
        kind=st.sampled_from(types),
        name=st.sampled_from(["", "x" * 200, "7"]),
    )
    def run(path: str, body: bytes, kind: str, name: str) -> None:
        if left:
            fuzzer.send("POST", path, body, content_type=kind, x_request_id=name)

    run()


def test_methods_and_paths(fuzzer: Fuzzer) -> None:
    left = Budget()
    known = [*fuzzer.schema["paths"], "/health", "/v1/models", "/openapi.json", "/docs", "/metrics", "/demo-fp16", "/"]
    odd = st.text(st.characters(codec="ascii", exclude_characters="#?"), max_size=12).map(lambda text: f"/{text}")
    prefixes = st.sampled_from(["", "/demo-fp16", "/org--demo-awq", "/org/demo-awq", "//", "/v1", "/%2e%2e"])
    methods = st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])

    @fuzz(method=methods, prefix=prefixes, path=st.one_of(st.sampled_from(known), odd), query=st.text(max_size=8))
    def run(method: str, prefix: str, path: str, query: str) -> None:
        try:
            url = httpx.URL(f"{fuzzer.client.base_url}{prefix}{path}".rstrip("/") or "/", params={"q": query})
        except httpx.InvalidURL:
            return
        if left:
            fuzzer.send(method, str(url))

    run()
