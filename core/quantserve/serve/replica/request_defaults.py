"""Request defaults: fields that a client leaves out get the value in the model's config.

vLLM has defaults for a few sampling fields and none for stops. This layer writes them into the JSON body, so that every
field can have one. A field that is absent or null gets the default; stops are added to those of the client.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from msgspec import Raw
from starlette.types import ASGIApp, Receive, Scope, Send

from quantserve.serve.asgi import header, is_json, read_body, replay
from quantserve.serve.headers import MAX_TOKENS_HEADER
from quantserve.serve.json_fields import LONGEST_NUMBER, FieldReader, integer, spliced
from quantserve.serve.routes import CHAT, COMPLETIONS, OUTPUT_TOKENS, UNBOUNDED

PATHS: Final = frozenset({CHAT, COMPLETIONS})
UNITED: Final = ("stop", "stop_token_ids")
"""Fields where the client's values and the defaults are combined."""
LENGTH_HEADERS: Final = (b"content-length", b"transfer-encoding")
REPLACED_BY: Final = {"max_tokens": "max_completion_tokens"}
"""OpenAI's newer name of a field: if the client sets it, the older field gets no default."""


TOKEN_FIELDS: Final = tuple(sorted({field for fields in OUTPUT_TOKENS.values() for field in fields}))
COMPLETED: Final = frozenset({*UNBOUNDED, *PATHS})


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
        self._reader = FieldReader(("messages", *TOKEN_FIELDS, *self.defaults))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Complete the body of a request for tokens; forward other requests unchanged."""
        if scope["type"] != "http" or scope["method"] != "POST" or (route := _route(scope)) not in COMPLETED:
            await self.app(scope, receive, send)
            return
        cap = self._cap(scope)
        if is_json(scope) and (cap is not None or (self.defaults and route in PATHS)):
            body = await read_body(receive)
            if changes := self._changes(route, self._reader.read(body), cap):
                body = spliced(body, changes)
                headers = [pair for pair in scope["headers"] if pair[0] not in LENGTH_HEADERS]
                scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
            receive = replay(body, receive)
            del body  # it may be long, and is not needed while the response is produced
        await self.app(scope, receive, send)

    def _cap(self, scope: Scope) -> int | None:
        """The gateway's cap, if it is below the context length."""
        value = header(scope, MAX_TOKENS_HEADER)
        if not value.isdigit() or self.max_model_len is None or int(value) >= self.max_model_len:
            return None
        return int(value)

    def _changes(self, route: str, fields: Mapping[str, Raw], cap: int | None) -> dict[str, Any]:
        """The fields to add to a body or to replace in it."""
        numbers = [name for name in OUTPUT_TOKENS[route] if name in fields]
        body = {name: _value(name, fields[name]) for name in (*numbers, *self.defaults) if name in fields}
        changes = self._missing(body) if route in PATHS else {}
        if cap is not None:
            changes |= capped(route, {**body, **changes}, cap, chat="messages" in fields)
        return changes

    def _missing(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults that a body lacks."""
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
        return missing


def _value(name: str, raw: Raw) -> Any:
    """The value of a field; True for a long one whose value does not matter."""
    return json.loads(bytes(raw)) if name in UNITED or len(memoryview(raw)) <= LONGEST_NUMBER else True


def capped(route: str, body: Mapping[str, Any], cap: int, *, chat: bool = True) -> dict[str, int]:
    """The token fields of a body that are above the cap, with the cap; and that field if there must be one.

    A completion without the field gets vLLM's default of 16.
    """
    fields = OUTPUT_TOKENS[route]
    if route == COMPLETIONS and "max_tokens" in body and body["max_tokens"] is None:
        return {"max_tokens": cap}
    if route in UNBOUNDED and (chat or route != "/invocations") and all(body.get(field) is None for field in fields):
        return {fields[-1]: cap}
    return {field: cap for field in fields if integer(body.get(field)) > cap}


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
        if body.get(key) is not None and (limit := integer(body[key])) < missing["min_tokens"]:
            missing["min_tokens"] = limit


def _route(scope: Scope) -> str:
    """The path below the mount point."""
    path, root = scope["path"], scope.get("root_path", "")
    return str(path[len(root) :] if root and path.startswith(root) else path)
