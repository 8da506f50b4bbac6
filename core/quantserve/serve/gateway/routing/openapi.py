"""The gateway's OpenAPI schema, merged from the schemas of the models' servers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from quantserve.serve.routes import is_client_path

METHODS: Final = ("get", "put", "post", "delete", "options", "head", "patch", "trace")
JSON: Final = "application/json"
ENVELOPE: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
MODEL: Final = {"type": "object", "required": ["id", "object"], "properties": {"id": {"type": "string"}}}
MODEL_STATUS: Final = {
    "type": "object",
    "required": ["id", "state"],
    "properties": {
        "id": {"type": "string"},
        "state": {"enum": ["ready", "starting", "unhealthy", "stopped"]},
    },
}
HEALTH: Final = {
    "type": "object",
    "required": ["status"],
    "properties": {"status": {"enum": ["ok", "degraded", "down"]}, "models": {"type": "object"}},
}
ERRORS: Final = {
    status: {
        "description": "An error",
        "content": {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    for status in ("4XX", "5XX")
}


def public_schema(
    schemas: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    *,
    several: bool,
    extra: Sequence[str] = (),
    route: str = "",
) -> dict[str, Any]:
    """The schema of the paths that clients reach at one address.

    Args:
        schemas: of the models' own servers, at least one.
        names: model names that requests may use in ``model``.
        several: whether the gateway routes by ``model``: then the schema has only JSON POST requests, beside the
            gateway's own paths, and ``model`` is required.
        extra: which of ``/metrics`` and ``/status`` the gateway serves.
        route: prefix of all paths.
    """
    paths: dict[str, Any] = {}
    components: dict[str, Any] = {}
    for schema in schemas:
        for kind, found in copy.deepcopy(dict(schema.get("components") or {})).items():
            components.setdefault(kind, {}).update(found)
        for path, item in copy.deepcopy(dict(schema.get("paths") or {})).items():
            if not is_client_path(path):
                continue
            if operations := {key: value for key, value in item.items() if not several or _routable(key, value)}:
                paths.setdefault(path, operations)
    for operation in _operations(paths):
        responses = operation.get("responses") or {}
        good = {status: response for status, response in responses.items() if status[:1] in "123"}
        operation["responses"] = {**good, **ERRORS}
        _name_models(operation, components.get("schemas") or {}, names, required=several)
    components.setdefault("schemas", {})["Error"] = ENVELOPE
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    first = schemas[0]
    return {
        "openapi": first.get("openapi", "3.1.0"),
        "info": {"title": "quantserve", "version": str((first.get("info") or {}).get("version", "0"))},
        **({"servers": [{"url": route}]} if route else {}),
        "security": [{"key": []}, {}],
        "paths": {**paths, **_own_paths(names, extra)},
        "components": components,
    }


def _routable(method: str, operation: Any) -> bool:
    """Whether the gateway can route such a request by the ``model`` field of its body."""
    return method == "post" and JSON in ((operation.get("requestBody") or {}).get("content") or {})


def _operations(paths: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for item in paths.values():
        yield from (operation for method, operation in item.items() if method in METHODS)


def _name_models(operation: Mapping[str, Any], known: Mapping[str, Any], names: Sequence[str], required: bool) -> None:
    """Set the allowed values of the ``model`` field of a request body."""
    body = ((operation.get("requestBody") or {}).get("content") or {}).get(JSON, {}).get("schema") or {}
    for option in (body, *body.get("anyOf", ()), *body.get("oneOf", ())):
        schema = known.get(str(option.get("$ref", "")).rpartition("/")[2])
        if schema is None or "model" not in (schema.get("properties") or {}):
            continue
        schema["properties"]["model"] = {"type": "string", "enum": list(names), "title": "Model"}
        if required:
            schema["required"] = sorted({*schema.get("required", ()), "model"})


def _own_paths(names: Sequence[str], extra: Sequence[str]) -> dict[str, Any]:
    """The paths that the gateway serves itself."""
    listed = {"type": "object", "properties": {"data": {"type": "array", "items": MODEL}}}
    one = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "enum": list(names)}}
    sick = {"503": {"description": "A model is not available", "content": {JSON: {"schema": HEALTH}}}}
    own = {
        "/health": {"get": {**_operation("Health", HEALTH), "security": []}},
        "/v1/models": {"get": _operation("Show Available Models", listed)},
        "/v1/models/{model}": {"get": {**_operation("Show One Model", MODEL), "parameters": [one]}},
    }
    own["/health"]["get"]["responses"] |= sick
    if "/status" in extra:
        status = {"type": "object", "properties": {"models": {"type": "array", "items": MODEL_STATUS}}}
        own["/status"] = {"get": _operation("Status", status)}
    if "/metrics" in extra:
        text = {"200": {"description": "Prometheus' text", "content": {"text/plain": {"schema": {"type": "string"}}}}}
        own["/metrics"] = {"get": {"summary": "Metrics", "responses": {**text, **ERRORS}}}
    return own


def _operation(summary: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    good = {"200": {"description": "Successful Response", "content": {JSON: {"schema": schema}}}}
    return {"summary": summary, "responses": {**good, **ERRORS}}


def rendered(texts: Sequence[bytes], names: Sequence[str], **settings: Any) -> bytes:
    """`public_schema`, with schemas and result as JSON texts."""
    schema = public_schema([json.loads(text) for text in texts], names, **settings)
    return json.dumps(schema, separators=(",", ":")).encode()
