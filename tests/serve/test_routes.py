"""The lists of routes and limited fields against the installed vLLM: its real app with every optional router."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import types
import typing
from argparse import Namespace
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quantserve.serve.asgi import Refused
from quantserve.serve.gateway.middleware.limits import (
    CHOICE_FIELDS,
    PROMPT_FIELDS,
    STOP_FIELDS,
    TOKEN_FIELDS,
    Limits,
    Policy,
)
from quantserve.serve.gateway.routing.router import Router, ServedModel
from quantserve.serve.json_fields import FieldReader
from quantserve.serve.replica.vllm.first_errors import stop_at_first_errors
from quantserve.serve.routes import CLIENT_PATHS, FORMS, INPUT_TOKENS, OUTPUT_TOKENS, is_client_path

from .asgi_client import request
from .server import DEMO

pytestmark = pytest.mark.vllm

OWN = {"/openapi.json", "/health", "/metrics", "/v1/models"}
CONTROL = {
    "/docs", "/docs/oauth2-redirect", "/redoc", "/kv_event_sources", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter", "/start_profile", "/stop_profile", "/reset_prefix_cache", "/reset_mm_cache",
    "/reset_encoder_cache", "/collective_rpc", "/server_info", "/sleep", "/release_kv_cache_memory", "/wake_up",
    "/is_sleeping", "/pause", "/resume", "/abort_requests", "/is_paused", "/init_weight_transfer_engine",
    "/shutdown_weight_transfer_engine", "/start_weight_update", "/start_draft_weight_update", "/update_weights",
    "/finish_weight_update", "/update_weight_version", "/weight_info", "/weight_checker", "/get_world_size",
    "/scale_elastic_ep", "/is_scaling_elastic_ep", "/inference/v1/generate", "/inference/v1/abort_requests",
    "/v1/realtime", "/fault_tolerance/apply", "/fault_tolerance/status", "/adapters", "/adapters/{adapter_name}",
}  # fmt: skip
NOT_IN_THIS_INSTALLATION = {"/cohere/v2/chat", "/cohere/v2/chat/render"}
"""Only with the package `cohere`."""
NO_LIMIT = {
    # Of the prompt, of thoughts within the output, or reported.
    "max_tokens_per_doc", "max_tokens_per_query", "thinking_token_budget", "prompt_tokens",
    # Lists that only max_json_values bounds.
    "allowed_token_ids", "audio", "embedding_types", "generate_responses", "include", "label_token_ids",
    "logprob_token_ids", "previous_input_messages", "prompt_embeds", "prompt_token_ids", "query", "system",
    "timestamp_granularities", "tokens", "tools", "videos",
}  # fmt: skip
SPELLINGS: list[object] = [
    "999", " 999 ", 999.0, "999.0", True, "true", "1_000", "٩٩٩", "1e3", 1e3, "+999", "0x3e7", "999.", None, [999],
    "\u00a0999", "0000999", "-999", -999, "999.5", 999.5, "", " ", {}, "\uff19\uff19", "1__0", "_1", "9" * 30,
    " " * 300 + "999",
]  # fmt: skip


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    """vLLM's app for every task, with every optional router."""
    from vllm import tasks
    from vllm.config import ProfilerConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    with pytest.MonkeyPatch.context() as patch:
        for name in ("VLLM_SERVER_DEV_MODE", "VLLM_ENABLE_COHERE_API", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            patch.setenv(name, "1")
        engine = AsyncEngineArgs(model=str(DEMO / "checkpoint"))
        values = {f.name: getattr(engine, f.name) for f in dataclasses.fields(engine)}
        values |= {f.name: getattr(FrontendArgs(), f.name) for f in dataclasses.fields(FrontendArgs)}
        values |= {"enable_scale_out": True, "enable_fault_tolerance": True, "enable_tokenizer_info_endpoint": True}
        values["profiler_config"] = ProfilerConfig(profiler="torch", torch_profiler_dir="/tmp/unused")
        config = SimpleNamespace(get_pooling_task=lambda tasks: "embed")
        every = sorted({task for kind in vars(tasks).values() for task in get_args(kind) if isinstance(task, str)})
        yield build_app(Namespace(**values), tuple(every), config)  # type: ignore[arg-type]


def paths(app: Any) -> set[str]:
    return {route.path for route in app.routes}


def models_of(kind: Any) -> Iterator[type[BaseModel]]:
    """The request classes in a type."""
    if isinstance(kind, type) and issubclass(kind, BaseModel) and not kind.__name__.startswith("Body_"):
        yield kind
    elif get_origin(kind) in (typing.Annotated, typing.Union, types.UnionType):
        for part in get_args(kind):
            yield from models_of(part)


def requests_of(app: Any) -> dict[str, list[type[BaseModel]]]:
    """By client path, its request classes."""
    found = {}
    for route in app.routes:
        field = getattr(route, "body_field", None)
        if field is not None and is_client_path(route.path):
            found[route.path] = list(models_of(field.field_info.annotation))
    assert len(found) > 25
    assert all(found.values())
    return found


def test_every_route_is_known(app: Any) -> None:
    listed = {path for path in paths(app) if is_client_path(path)}
    assert paths(app) - listed == (OWN | CONTROL) - {"/metrics"}
    assert {path for path in CLIENT_PATHS if path not in paths(app)} <= NOT_IN_THIS_INSTALLATION
    assert not {path for path in CONTROL if is_client_path(path)}


def test_no_control_route_is_reached_and_every_client_route_is(app: Any) -> None:
    reached: list[str] = []

    async def recorded(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(scope["path"])
        await Response("{}")(scope, receive, send)

    async def healthy() -> bool:
        return True

    served = [ServedModel({"id": name}, recorded, healthy, f"/{name}") for name in ("a", "b")]
    for models in (served[:1], served):
        router = Limits(Router(models), Policy())
        for path in sorted(CONTROL):
            spelled = path.replace("{adapter_name}", "x")
            for variant in (spelled, spelled + "/", "/" + spelled, spelled + "//", spelled.upper(), spelled + ";x"):
                for prefix in ("", "/a", "//a"):
                    for method in ("GET", "POST", "PUT", "DELETE"):
                        answer = asyncio.run(request(router, method, prefix + variant, {"model": "a"}))
                        assert (answer.status, answer.error["code"]) == (404, "unknown_url"), (method, prefix + variant)
        assert reached == []
        for path in sorted(path for path in paths(app) if is_client_path(path)):
            spelled = path.replace("{response_id}", "resp_1")
            for variant in (spelled, spelled + "/"):
                assert asyncio.run(request(router, "POST", "/a" + variant, {"model": "a"})).status == 200
                assert reached.pop() == spelled


def test_every_field_for_output_tokens_is_known(app: Any) -> None:
    for path, classes in requests_of(app).items():
        fields = {name for one in classes for name in one.model_fields}
        tokens = {name for name in fields if re.search(r"max.*token|token.*(max|budget)", name)} - NO_LIMIT
        if path.endswith((*INPUT_TOKENS, "render")):
            continue
        assert tokens == set(OUTPUT_TOKENS.get(path, ())), path
        aliases = {str(field.alias) for one in classes for field in one.model_fields.values() if field.alias}
        limited = {*TOKEN_FIELDS, *CHOICE_FIELDS, *STOP_FIELDS, *PROMPT_FIELDS, "messages", "questions"}
        assert not aliases & limited
        assert not {
            name for one in classes for name, field in one.model_fields.items() if field.alias and name in limited
        }


def test_every_list_of_a_request_is_known(app: Any) -> None:
    limited = {*STOP_FIELDS, *PROMPT_FIELDS, "messages", "questions"}
    unknown = {
        name: (path, str(field.annotation)[:100])
        for path, classes in requests_of(app).items()
        for one in classes
        for name, field in one.model_fields.items()
        if re.search(r"(^|[ .|])([Ll]ist|Sequence|[Ii]terable|tuple)\[", str(field.annotation))
        and not re.search(r"^dict\[", str(field.annotation))
        and name not in limited | NO_LIMIT
    }
    assert not unknown


@pytest.mark.parametrize("path", sorted(OUTPUT_TOKENS))
def test_numbers_are_judged_as_vllm_reads_them(app: Any, path: str) -> None:
    if path in NOT_IN_THIS_INSTALLATION:
        pytest.skip("not in this installation")
    classes = requests_of(app)["/v1/chat/completions" if path == "/invocations" else path]
    policy = Policy(max_tokens=998, max_choices=998)
    limits = Limits(lambda *_: None, policy)  # type: ignore[arg-type]
    reader = FieldReader((*TOKEN_FIELDS, *CHOICE_FIELDS))
    read_by_vllm = 0
    for one in classes:
        for name in (set(OUTPUT_TOKENS[path]) | {"n"}) & set(one.model_fields):
            adapter: TypeAdapter[Any] = TypeAdapter(one.model_fields[name].annotation)
            for value in SPELLINGS:
                try:
                    asked = adapter.validate_python(value)
                except ValidationError:
                    continue
                read_by_vllm += 1
                refused = False
                try:
                    limits.check(path, reader.read(json.dumps({name: value}).encode()))
                except Refused:
                    refused = True
                assert refused >= ((asked or 0) > 998), (name, value, asked)
                if len(json.dumps(value)) < 100:
                    assert refused == ((asked or 0) > 998), (name, value, asked)
    assert read_by_vllm > 10


def test_forms_are_those_of_vllm(app: Any) -> None:
    from fastapi.params import Form

    found = {
        route.path
        for route in app.routes
        if getattr(route, "body_field", None) is not None and isinstance(route.body_field.field_info, Form)
    }
    assert found == FORMS


CHAT_ITEM = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
INPUT_ITEM = {"role": "user", "content": [{"type": "input_text", "text": "hi"}]}
VALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [CHAT_ITEM] * 3, "stop": ["a"], "logit_bias": {"5": 1}, "n": "2"}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "stop": "a"}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 5.0}),
    ("/v1/responses", {"input": [INPUT_ITEM, {"type": "function_call_output", "call_id": "1", "output": "x"}]}),
    ("/v1/responses", {"input": "hi", "tools": [{"type": "function", "name": "f", "parameters": {}, "strict": True}]}),
    ("/v1/embeddings", {"input": [1, 2, 3]}),
    ("/v1/embeddings", {"messages": [CHAT_ITEM]}),
    ("/v1/messages", {"model": "m", "max_tokens": 3, "messages": [CHAT_ITEM]}),
    ("/v1/score", {"queries": "a", "documents": ["b", "c"]}),
    ("/tokenize", {"messages": [CHAT_ITEM]}),
]
INVALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/responses", {"input": [1] * 500}),
    ("/v1/responses", {"input": [{}] * 500}),
    ("/v1/responses", {"input": [{"role": "user", "content": [1] * 500}]}),
    ("/v1/chat/completions", {"messages": [CHAT_ITEM], "tools": [[]] * 500}),
    ("/v1/chat/completions", {"messages": [CHAT_ITEM], "logit_bias": dict.fromkeys(map(str, range(500)), "x")}),
    ("/v1/completions", {"prompt": [1.5] * 500}),
    ("/v1/embeddings", {"input": [1.5] * 500}),
    ("/v1/messages", {"model": "m", "max_tokens": 3, "messages": [1] * 500}),
]


def field_of(app: Any, path: str) -> Any:
    return next(route for route in app.routes if route.path == path).dependant.body_params[0]


def test_validation_stops_at_the_first_invalid_item_of_a_list(app: Any) -> None:
    """Last: it changes the app."""
    before = [field_of(app, path).validate(body, {}, loc=("body",)) for path, body in VALID]
    many = [len(field_of(app, path).validate(body, {}, loc=("body",))[1]) for path, body in INVALID]
    stop_at_first_errors(app)
    for (path, body), (value, errors) in zip(VALID, before, strict=True):
        assert errors == [], path
        found, errors = field_of(app, path).validate(body, {}, loc=("body",))
        assert errors == [], path
        assert type(found) is type(value)
        ignored = {"request_id"}
        assert found.model_dump(exclude=ignored) == value.model_dump(exclude=ignored)
    few = [len(field_of(app, path).validate(body, {}, loc=("body",))[1]) for path, body in INVALID]
    assert [now for now in few if not 0 < now < 400] == []
    assert [then for then in many if then < 500] == []
