"""Request defaults: fields that a client leaves out get the value in the model's config.

vLLM has defaults for a few sampling fields and none for stops. This layer writes them into the JSON body, so that every
field can have one. A field that is absent or null gets the default; stops are added to those of the client.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from starlette.types import ASGIApp, Receive, Scope, Send

from quantserve.serve.asgi import header, is_json, parse_object, read_body, replay

PATHS: Final = frozenset({"/v1/chat/completions", "/v1/completions"})
MAX_TOKENS_HEADER: Final = b"x-quantserve-max-tokens"
"""Header from the gateway: the cap on tokens, also for requests that set none of the token fields."""
CAPPED: Final = {
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
}
"""By path, the fields for the number of output tokens."""
UNITED: Final = ("stop", "stop_token_ids")
"""Fields where the client's values and the defaults are combined."""
LENGTH_HEADERS: Final = (b"content-length", b"transfer-encoding")
REPLACED_BY: Final = {"max_tokens": "max_completion_tokens"}
"""OpenAI's newer name of a field: if the client sets it, the older field gets no default."""


class RequestDefaults:
    """Pure ASGI layer around a model's app.

    Args:
        app: the model's app.
        defaults: values by request field; ``stop`` a list of texts, ``stop_token_ids`` a list of ids. Without any,
            bodies are not read.
        max_model_len: context length in tokens. A cap of the gateway at or above it is ignored: vLLM refuses requests
            for more, and limits the others to the room after the prompt.
    """

    def __init__(self, app: ASGIApp, defaults: Mapping[str, Any], max_model_len: int | None = None) -> None:
        self.app = app
        self.max_model_len = max_model_len
        self.defaults = {key: value for key, value in defaults.items() if value is not None and value != []}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Complete the body of a completion request; forward other requests unchanged."""
        if scope["type"] != "http" or scope["method"] != "POST" or (route := _route(scope)) not in CAPPED:
            await self.app(scope, receive, send)
            return
        cap = self._cap(scope)
        if cap is not None or (self.defaults and route in PATHS):
            body = await read_body(receive)
            if is_json(scope) and (completed := self._completed(route, parse_object(body), cap)) is not None:
                body = json.dumps(completed, separators=(",", ":")).encode()
                headers = [pair for pair in scope["headers"] if pair[0] not in LENGTH_HEADERS]
                scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
            receive = replay(body, receive)
        await self.app(scope, receive, send)

    def _cap(self, scope: Scope) -> int | None:
        """The gateway's cap, if it is below the context length."""
        value = header(scope, MAX_TOKENS_HEADER)
        if not value.isdigit() or self.max_model_len is None or int(value) >= self.max_model_len:
            return None
        return int(value)

    def _completed(self, route: str, body: dict[str, Any], cap: int | None) -> dict[str, Any] | None:
        """The body with defaults and cap applied, or None if nothing changes."""
        completed = self.complete(body) if route in PATHS else None
        if cap is None:
            return completed
        return capped(route, body if completed is None else completed, cap) or completed

    def complete(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """The body with defaults, or None if nothing changes."""
        missing: dict[str, Any] = {}
        for key, default in self.defaults.items():
            given = body.get(key)
            if key in UNITED:
                values = [given] if isinstance(given, str) else given
                if values is None or isinstance(values, list):
                    united = union(values or (), default)
                    if united != given:
                        missing[key] = united
            elif given is None and body.get(REPLACED_BY.get(key, "")) is None:
                missing[key] = default
        if "min_tokens" in missing:
            _keep_below_limit(missing, body)
        return {**body, **missing} if missing else None


def capped(route: str, body: Mapping[str, Any], cap: int) -> dict[str, Any] | None:
    """The body with the cap applied to its token field, or None if the value there is small enough.

    A completion without the field gets vLLM's default of 16, with null as many as fit into the context.
    """
    fields = CAPPED[route]
    asked = [body[field] for field in fields if isinstance(body.get(field), int)]
    if route == "/v1/completions" and "max_tokens" not in body:
        return None
    if asked:
        large = {field: cap for field in fields if isinstance(body.get(field), int) and body[field] > cap}
        return {**body, **large} if large else None
    return {**body, fields[0]: cap}


def union(first: Iterable[Any], second: Iterable[Any]) -> list[Any]:
    """Both in order, without duplicates."""
    result: list[Any] = []
    for value in (*first, *second):
        if value not in result:
            result.append(value)
    return result


def _keep_below_limit(missing: dict[str, Any], body: Mapping[str, Any]) -> None:
    """Lower a default ``min_tokens`` to the client's maximum; vLLM would refuse a minimum above it."""
    for key in ("max_completion_tokens", "max_tokens"):
        limit = body.get(key)
        if isinstance(limit, int) and limit < missing["min_tokens"]:
            missing["min_tokens"] = limit


def _route(scope: Scope) -> str:
    """The path below the mount point."""
    path, root = scope["path"], scope.get("root_path", "")
    return str(path[len(root) :] if root and path.startswith(root) else path)
