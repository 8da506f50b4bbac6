"""The gateway's router: one OpenAI-compatible API for all models, routed by ``model`` in the request body.

It reads a request only as far as needed to find the model, and forwards requests and responses unchanged. Each model
also has its own route.
"""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from quantserve.plugins.pages import NAME
from quantserve.serve.asgi import (
    JSON_KEY,
    Refused,
    answer_lifespan,
    ask,
    header,
    is_json,
    parse_object,
    read_body,
    replay,
)
from quantserve.serve.gateway.middleware.trace import trace_of
from quantserve.serve.gateway.routing.openapi import rendered
from quantserve.serve.gateway.routing.shared import Shared
from quantserve.serve.routes import is_client_path, local_path
from quantserve.text import harmless

if TYPE_CHECKING:
    from quantserve.planning.plan import Plan
    from quantserve.serve.gateway.page import Page

OWNER: Final = "quantserve"
LISTED: Final = 20
"""Most model ids listed in an error."""
RESERVED: Final = frozenset(
    {"v1", "v2", "health", "metrics", "status", "explorer", "tokenize", "detokenize", "docs", "openapi.json", "-"}
)
"""First path segments that a model's route must not use."""
READ_ONLY: Final = ("GET", "HEAD")


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model behind the gateway.

    Attributes:
        card: its entry in ``/v1/models``.
        app: ASGI app that serves its requests.
        healthy: health check.
        route: path prefix of the model's own route.
        aliases: further names that clients may use, such as LoRA adapters.
    """

    card: Mapping[str, Any]
    app: ASGIApp
    healthy: Callable[[], Awaitable[bool]]
    route: str
    aliases: Sequence[str] = ()

    @property
    def id(self) -> str:
        """The id clients use."""
        return str(self.card["id"])


def model_card(plan: Plan, created: int) -> dict[str, Any]:
    """A model's entry in ``/v1/models``: OpenAI's fields, vLLM's ``max_model_len``, and ours under ``metadata``."""
    length = plan.max_model_len or (plan.memory or {}).get("max_model_len")
    return {
        "id": plan.model_id,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "root": plan.model_id,
        "parent": None,
        "max_model_len": length,
        "metadata": {
            "method": plan.method.get("name"),
            "bits": plan.method.get("bits"),
            "max_model_len": length,
            "expected_performance": plan.expected,
            "description": plan.description,
            "url": plan.url,
            "route": plan.route_prefix,
        },
    }


def model_aliases(plan: Plan) -> list[str]:
    """Names of the LoRA adapters that vLLM serves with the model."""
    modules = plan.frontend_args.get("lora_modules") or []
    return [str(module["name"]) for module in modules if isinstance(module, Mapping) and module.get("name")]


class Router:
    """ASGI app that routes to several models, or to one, which then gets every client path of vLLM's server.

    Args:
        models: at least one; ids differ.
        metrics: ASGI app for ``GET /metrics``; None routes that path like any other.
        health_cache_s: seconds a health check and the API schema are reused.
        status: ASGI app for ``GET /status``; None routes that path like any other.
        page: the page at ``/``.
        work: runs beside the app, from its startup to its shutdown.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        metrics: ASGIApp | None = None,
        health_cache_s: float = 0.0,
        status: ASGIApp | None = None,
        page: Page | None = None,
        work: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self.metrics = metrics
        self.status = status
        self.page = page
        self._work = work
        self.models = {model.id: model for model in models}
        self.names = {name: model for model in models for name in (model.id, *model.aliases)}
        self.routes = {model.route.strip("/"): model for model in models}
        self.only = models[0] if len(models) == 1 else None
        self._healthy = {model.id: Shared(model.healthy, health_cache_s) for model in models}
        ways: list[tuple[str, list[ServedModel]]] = [("", list(models)), *((model.route, [model]) for model in models)]
        self._schemas = {route: Shared(partial(self._schema, served, route), health_cache_s) for route, served in ways}
        self._rendered: dict[str, tuple[list[bytes], bytes]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or forward the request to its model."""
        if scope["type"] == "lifespan":
            await answer_lifespan(receive, send, self._work)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["path"] == "*" and scope["method"] == "OPTIONS":
            await Response(status_code=204, headers={"allow": "GET, HEAD, POST, OPTIONS"})(scope, receive, send)
            return
        scope = {**scope, "path": local_path(scope), "root_path": ""}
        segment = scope["path"].split("/", 2)[1]
        if scope["path"] == "/metrics" and self.metrics and scope["method"] in READ_ONLY:
            await self.metrics(scope, receive, send)
            return
        if scope["path"] == "/status" and self.status:
            await self.status(scope, receive, send)
            return
        if self.page and segment in ("", NAME) and self.page.takes(scope):
            await self.page(scope, receive, send)
            return
        if model := self.routes.get(segment):
            scope = {**scope, "path": scope["path"][len(segment) + 1 :] or "/"}
            await self._one(model, scope, receive, send, model.route)
        elif self.only:
            await self._one(self.only, scope, receive, send)
        else:
            await self._several(scope, receive, send)

    async def _one(self, model: ServedModel, scope: Scope, receive: Receive, send: Send, route: str = "") -> None:
        """Serve a request to one model; its ``model`` field must not name another."""
        if response := await self._own(scope, [model], route):
            await response(scope, receive, send)
            return
        if not is_client_path(scope["path"]):
            raise self._unknown_path(scope["path"])
        if scope["method"] not in (*READ_ONLY, "POST"):  # it would wait in the queue to be refused by the replica
            message = f"Method {scope['method']} is not allowed here; use GET or POST."
            raise Refused(405, message, code="method_not_allowed", headers={"allow": "GET, HEAD, POST"})
        fields: Mapping[str, Any] = {}
        if scope["method"] == "POST" and is_json(scope) and scope["path"].startswith("/v1/"):
            fields, receive = await _fields(scope, receive)
            name = fields.get("model")
            if name is not None and (not isinstance(name, str) or self.names.get(name) is not model):
                raise self._unknown(name, [model.id, *model.aliases])
        await self._forward_to(model, fields, scope, receive, send)

    async def _several(self, scope: Scope, receive: Receive, send: Send) -> None:
        if response := await self._own(scope, list(self.models.values())):
            await response(scope, receive, send)
        elif not is_client_path(scope["path"]) or scope["method"] != "POST":
            raise self._unknown_path(scope["path"])
        else:
            await self._forward(scope, receive, send)

    async def _own(self, scope: Scope, models: Sequence[ServedModel], route: str = "") -> Response | None:
        """The response to paths that the gateway serves itself: overview, health, list of models and API schema."""
        path: str = scope["path"]
        if path not in ("/", "/health", "/openapi.json", "/v1/models") and not path.startswith("/v1/models/"):
            return None
        if scope["method"] not in READ_ONLY:
            message = f"Method {scope['method']} is not allowed here; use GET."
            raise Refused(405, message, code="method_not_allowed", headers={"allow": "GET"})
        if path == "/":
            overview = _overview(route, self.metrics is not None, self.status is not None)
            return JSONResponse(overview, headers={"vary": "accept"} if self.page and not route else None)
        if path == "/health":
            return await self._health(models)
        if path == "/openapi.json":
            return Response(await self._schemas[route](), media_type="application/json")
        return self._models(path, {name: model for name, model in self.names.items() if model in models})

    async def _health(self, models: Sequence[ServedModel]) -> Response:
        """Every model's health check; 200 only when all pass."""
        found = await asyncio.gather(*(self._healthy[model.id]() for model in models))
        body = {
            "status": "ok" if all(found) else "degraded" if any(found) else "down",
            "models": {model.id: "ok" if up else "unavailable" for model, up in zip(models, found, strict=True)},
        }
        return JSONResponse(body, 200 if all(found) else 503)

    async def _schema(self, models: Sequence[ServedModel], route: str) -> bytes:
        """The OpenAPI schema of these models' servers, restricted to the paths that clients can reach.

        Models without a healthy replica are left out, so that a request for the schema starts no replica.
        """
        up = [model for model in models if await self._healthy[model.id]()]
        answers = await asyncio.gather(*(ask(model.app, "GET", "/openapi.json") for model in up))
        texts = [text for status, text in answers if status == 200]
        if not texts:
            message = "No model is ready; the API schema comes from the models' servers. Retry when /health is ok."
            raise Refused(503, message, code="model_unavailable")
        known = self._rendered.get(route)
        if known is None or known[0] != texts:
            names = [name for name, model in self.names.items() if model in models]
            several = len(models) > 1
            ours = [] if route else [path for path in ("/metrics", "/status") if getattr(self, path[1:])]
            known = texts, rendered(texts, names, several=several, extra=ours, route=route)
            self._rendered[route] = known
        return known[1]

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Find the model that the body names, and forward the request to it."""
        if not is_json(scope):
            example = next(iter(self.models.values())).route
            kind = harmless(header(scope, b"content-type")[:100].decode("latin-1"))
            message = (
                f"Content-Type: {kind} is not supported here; send application/json. This server hosts several models: "
                f"a body other than JSON needs a model's route, e.g. {example}/v1."
            )
            raise Refused(415, message, code="unsupported_media_type")
        fields, receive = await _fields(scope, receive)
        name = fields.get("model")
        if name is None:
            message = f"`model` is missing. Available models: {_listed(self.names)}."
            raise Refused(400, message, param="model", code="missing_model")
        model = self.names.get(name) if isinstance(name, str) else None
        if model is None:
            raise self._unknown(name, self.names)
        await self._forward_to(model, fields, scope, receive, send)

    @staticmethod
    async def _forward_to(
        model: ServedModel, fields: Mapping[str, Any], scope: Scope, receive: Receive, send: Send
    ) -> None:
        trace = trace_of(scope)
        trace.model, trace.stream = model.id, fields.get("stream") is True
        trace.adapter = str(name) if (name := fields.get("model")) in model.aliases else ""
        trace.quant_method = str((model.card.get("metadata") or {}).get("method") or "")
        await model.app(scope, receive, send)

    @staticmethod
    def _models(path: str, known: Mapping[str, ServedModel]) -> Response:
        """``/v1/models`` and ``/v1/models/ID``; in ID slashes may be written as ``--``."""
        cards = [_card(name, model) for name, model in known.items()]
        name = path.removeprefix("/v1/models").strip("/")
        if not name:
            return JSONResponse({"object": "list", "data": cards})
        for candidate in (name, unquote(name), name.replace("--", "/")):
            if candidate in known:
                return JSONResponse(_card(candidate, known[candidate]))
        raise Router._unknown(name, known)

    def _unknown_path(self, path: str) -> Refused:
        hint = "GET /openapi.json lists the paths."
        if is_client_path(path):
            example = next(iter(self.models.values())).route
            hint = f"This server hosts several models; model-specific paths need a prefix, e.g. {example}{path[:200]}."
        return Refused(404, f"Unknown path {path[:200]}. {hint}", code="unknown_url")

    @staticmethod
    def _unknown(name: object, known: Mapping[str, Any] | Sequence[str]) -> Refused:
        if not isinstance(name, str):
            return Refused(400, "`model` must be a string.", param="model", code="invalid_type")
        close = difflib.get_close_matches(name[:200], list(known), n=1)
        hint = f" Did you mean `{close[0]}`?" if close else ""
        message = f"The model `{name[:200]}` does not exist.{hint} Available models: {_listed(known)}."
        return Refused(404, message, param="model", code="model_not_found")


async def _fields(scope: Scope, receive: Receive) -> tuple[Mapping[str, Any], Receive]:
    """Fields of the JSON body, maybe empty, from the scope if the limits layer has parsed it; and a channel with it."""
    parsed = scope.get(JSON_KEY)
    if isinstance(parsed, Mapping):
        return parsed, receive
    body = await read_body(receive)
    return parse_object(body) if body else {}, replay(body, receive)


def _overview(route: str, metrics: bool, status: bool) -> dict[str, Any]:
    """The response to ``GET /``."""
    paths = {"models": "/v1/models", "health": "/health", "schema": "/openapi.json"}
    if not route:
        paths |= {"metrics": "/metrics"} if metrics else {}
        paths |= {"status": "/status"} if status else {}
    return {"name": "quantserve", "api": "OpenAI-compatible", **{name: route + path for name, path in paths.items()}}


def _card(name: str, model: ServedModel) -> dict[str, Any]:
    return dict(model.card) if name == model.id else {**model.card, "id": name, "root": name, "parent": model.id}


def _listed(names: Mapping[str, Any] | Sequence[str]) -> str:
    some = [f"`{name}`" for name in list(names)[:LISTED]]
    return ", ".join(some) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
