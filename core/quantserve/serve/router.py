"""The gateway's router: one OpenAI-compatible API for all models, routed by ``model`` in the request body.

It reads a request only as far as needed to find the model, and forwards requests and responses unchanged. Each model
also has its own route.
"""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from quantserve.serve.asgi import Refused, answer_lifespan, ask, is_json, parse_object, read_body, replay
from quantserve.serve.limits import JSON_KEY
from quantserve.serve.openapi import rendered
from quantserve.serve.trace import trace_of

if TYPE_CHECKING:
    from quantserve.plan import Plan

OWNER: Final = "quantserve"
LISTED: Final = 20
"""Most model ids listed in an error."""
RESERVED: Final = frozenset({"v1", "v2", "health", "metrics", "tokenize", "detokenize", "docs", "openapi.json", "-"})
"""First path segments that a model's route must not use."""
CLOSED: Final = frozenset({"/scale_elastic_ep", "/is_scaling_elastic_ep"})
"""Engine control paths of vLLM's server that clients must not reach; Ray Serve does the scaling here."""


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
    """ASGI app that routes to several models, or to one, which then gets every path the gateway does not serve itself.

    Args:
        models: at least one; ids differ.
        metrics: ASGI app for ``GET /metrics``; None routes that path like any other.
    """

    def __init__(self, models: Sequence[ServedModel], metrics: ASGIApp | None = None) -> None:
        self.metrics = metrics
        self.models = {model.id: model for model in models}
        self.names = {name: model for model in models for name in (model.id, *model.aliases)}
        self.routes = {model.route.strip("/"): model for model in models}
        self.only = models[0] if len(models) == 1 else None
        self._schemas: dict[str, tuple[list[bytes], bytes]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or forward the request to its model."""
        if scope["type"] == "lifespan":
            await answer_lifespan(receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        scope = self._without_root(scope)
        segment = scope["path"].split("/", 2)[1]
        if scope["path"] == "/metrics" and self.metrics and scope["method"] in ("GET", "HEAD"):
            await self.metrics(scope, receive, send)
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
        path = scope["path"]
        fields: Mapping[str, Any] = {}
        if scope["method"] == "POST" and is_json(scope) and path.startswith("/v1/"):
            body = await read_body(receive)
            fields = _fields(scope, body)
            name = fields.get("model")
            if name is not None and (not isinstance(name, str) or self.names.get(name) is not model):
                raise self._unknown(name, [model.id, *model.aliases])
            receive = replay(body, receive)
        await self._forward_to(model, fields, scope, receive, send)

    async def _several(self, scope: Scope, receive: Receive, send: Send) -> None:
        if response := await self._own(scope, list(self.models.values())):
            await response(scope, receive, send)
        elif scope["method"] != "POST":
            raise Refused(404, self._unknown_path(scope["path"]), code="unknown_url")
        else:
            await self._forward(scope, receive, send)

    async def _own(self, scope: Scope, models: Sequence[ServedModel], route: str = "") -> Response | None:
        """The response to paths that the gateway serves itself: health, the list of models and the API schema."""
        path: str = scope["path"]
        if path == "/health" and scope["method"] in ("GET", "HEAD"):
            return await _health(models)
        if path == "/v1/models" or path.startswith("/v1/models/"):
            return self._models(path, scope, {name: model for name, model in self.names.items() if model in models})
        if path == "/openapi.json" and scope["method"] in ("GET", "HEAD"):
            return Response(await self._schema(models, route), media_type="application/json")
        return None

    async def _schema(self, models: Sequence[ServedModel], route: str) -> bytes:
        """The OpenAPI schema of these models' servers, restricted to the paths that clients can reach.

        Models without a healthy replica are left out, so that a request for the schema starts no replica.
        """
        up = [model for model in models if await model.healthy()]
        answers = await asyncio.gather(*(ask(model.app, "GET", "/openapi.json") for model in up))
        texts = [text for status, text in answers if status == 200]
        if not texts:
            message = "No model is ready; the API schema comes from the models' servers. Retry when /health is ok."
            raise Refused(503, message, code="model_unavailable")
        known = self._schemas.get(route)
        if known is None or known[0] != texts:
            names = [name for name, model in self.names.items() if model in models]
            several = len(models) > 1
            ours = self.metrics is not None and not route
            known = texts, rendered(texts, names, several=several, metrics=ours, route=route, closed=CLOSED)
            self._schemas[route] = known
        return known[1]

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Find the model that the body names, and forward the request to it."""
        if not is_json(scope):
            example = next(iter(self.models.values())).route
            message = (
                f"This server hosts several models: a body other than JSON needs a model's route, e.g. {example}/v1."
            )
            raise Refused(415, message, code="unsupported_media_type")
        body = await read_body(receive)
        fields = _fields(scope, body)
        name = fields.get("model")
        if name is None:
            message = f"`model` is missing. Available models: {_listed(self.names)}."
            raise Refused(400, message, param="model", code="missing_model")
        model = self.names.get(name) if isinstance(name, str) else None
        if model is None:
            raise self._unknown(name, self.names)
        await self._forward_to(model, fields, scope, replay(body, receive), send)

    @staticmethod
    async def _forward_to(
        model: ServedModel, fields: Mapping[str, Any], scope: Scope, receive: Receive, send: Send
    ) -> None:
        if scope["path"].rstrip("/") in CLOSED:
            raise Refused(404, f"Unknown path {scope['path']}.", code="unknown_url")
        trace = trace_of(scope)
        trace.model, trace.stream = model.id, fields.get("stream") is True
        trace.quant_method = str((model.card.get("metadata") or {}).get("method") or "")
        await model.app(scope, receive, send)

    def _models(self, path: str, scope: Scope, known: Mapping[str, ServedModel]) -> Response:
        """``/v1/models`` and ``/v1/models/ID``; in ID slashes may be written as ``--``."""
        if scope["method"] not in ("GET", "HEAD"):
            raise Refused(405, f"Method {scope['method']} is not allowed here; use GET.", headers={"allow": "GET"})
        cards = [_card(name, model) for name, model in known.items()]
        name = path.removeprefix("/v1/models").strip("/")
        if not name:
            return JSONResponse({"object": "list", "data": cards})
        for candidate in (name, unquote(name), name.replace("--", "/")):
            if candidate in known:
                return JSONResponse(_card(candidate, known[candidate]))
        raise self._unknown(name, known)

    def _unknown_path(self, path: str) -> str:
        example = next(iter(self.models.values())).route
        hint = f"model-specific paths need a prefix, e.g. {example}{path[:200]}"
        return f"Unknown path {path[:200]}. This server hosts several models; {hint}."

    @staticmethod
    def _unknown(name: object, known: Mapping[str, Any] | Sequence[str]) -> Refused:
        if not isinstance(name, str):
            return Refused(400, "`model` must be a string.", param="model", code="invalid_type")
        close = difflib.get_close_matches(name[:200], list(known), n=1)
        hint = f" Did you mean `{close[0]}`?" if close else ""
        message = f"The model `{name[:200]}` does not exist.{hint} Available models: {_listed(known)}."
        return Refused(404, message, param="model", code="model_not_found")

    @staticmethod
    def _without_root(scope: Scope) -> Scope:
        """The scope with the path below the mount point, whether or not the server removed the prefix."""
        root = scope.get("root_path", "")
        path = scope["path"]
        path = path[len(root) :] if root and path.startswith(root) else path
        return {**scope, "path": path or "/", "root_path": ""}


def _fields(scope: Scope, body: bytes) -> Mapping[str, Any]:
    """The JSON object of a body; taken from the scope if the limits layer has parsed it."""
    parsed = scope.get(JSON_KEY)
    return parsed if isinstance(parsed, Mapping) else parse_object(body)


async def _health(models: Sequence[ServedModel]) -> Response:
    """Run every model's health check; 200 only when all pass."""
    found = await asyncio.gather(*(model.healthy() for model in models))
    body = {
        "status": "ok" if all(found) else "degraded" if any(found) else "down",
        "models": {model.id: "ok" if up else "unavailable" for model, up in zip(models, found, strict=True)},
    }
    return JSONResponse(body, 200 if all(found) else 503)


def _card(name: str, model: ServedModel) -> dict[str, Any]:
    return dict(model.card) if name == model.id else {**model.card, "id": name, "root": name, "parent": model.id}


def _listed(names: Mapping[str, Any] | Sequence[str]) -> str:
    some = [f"`{name}`" for name in list(names)[:LISTED]]
    return ", ".join(some) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
