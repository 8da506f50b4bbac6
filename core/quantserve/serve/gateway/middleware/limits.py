"""Request limits: the policy as plain data, the layer that enforces it, and the order of all public layers."""

from __future__ import annotations

import asyncio
import codecs
import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from msgspec import Raw
from pydantic import ConfigDict
from starlette.types import ASGIApp, Receive, Scope, Send

from quantserve.config.schema import HttpLimits
from quantserve.serve.asgi import JSON_KEY, Guard, Refused, header, is_json, replay
from quantserve.serve.gateway.middleware.access_log import AccessLog, check_destination
from quantserve.serve.gateway.middleware.api_keys import ApiKeys, KeySet, load_key_set
from quantserve.serve.gateway.middleware.bodies import BODY_KEY, MIB, Body, Buffers
from quantserve.serve.gateway.middleware.cors import Cors
from quantserve.serve.gateway.middleware.forms import is_form, read_form
from quantserve.serve.gateway.middleware.key_limit import KeyLimit
from quantserve.serve.gateway.middleware.trace import Observer, Traced, trace_of
from quantserve.serve.headers import MAX_TOKENS_HEADER
from quantserve.serve.json_fields import (
    INLINE,
    FieldReader,
    check_text,
    first,
    is_list_of_lists,
    is_token_ids,
    items,
    number,
    objects,
    shown,
    text,
    token_ids,
    too_many_values,
)
from quantserve.serve.routes import INPUT_TOKENS, OUTPUT_TOKENS, TOKEN_IDS, normalized

if TYPE_CHECKING:
    from quantserve.config import HttpConfig

TOKEN_FIELDS: Final = tuple(sorted({field for fields in OUTPUT_TOKENS.values() for field in fields}))
CHOICE_FIELDS: Final = ("n", "best_of")
STOP_FIELDS: Final = ("stop", "stop_sequences", "stop_token_ids", "bad_words")
PROMPT_FIELDS: Final = (
    "prompt", "input", "inputs", "texts", "images", "documents", "queries", "items",
    "data_1", "data_2", "text_1", "text_2",
)  # fmt: skip
SESSION_FIELDS: Final = ("prompt_cache_key", "user")
OPENING: Final = 4096
"""Bytes of a prompt's beginning that are kept for prefix affinity."""


class Policy(HttpLimits):
    """The limits of `HttpConfig` and the API keys; plain data that goes to other processes as JSON.

    Attributes:
        keys: digests of the API keys and their source.
    """

    model_config = ConfigDict(frozen=True, strict=False)

    keys: KeySet = KeySet()

    @classmethod
    def of(cls, http: HttpConfig) -> Policy:
        """The policy of a config, with the API keys of its file and of the environment.

        Raises:
            UsageError: the API keys cannot be used, or the access log cannot be written.
        """
        check_destination(http.access_log)
        limits = {name: getattr(http, name) for name in HttpLimits.model_fields}
        return cls(keys=load_key_set(http.api_keys_file), **limits)

    @property
    def max_body_bytes(self) -> int:
        """Longest request body."""
        return self.max_body_mb * MIB

    @property
    def has_keys(self) -> bool:
        """Whether requests need a key."""
        return bool(self.keys.digests)


def layers(
    app: ASGIApp,
    policy: Policy,
    observers: Sequence[Observer] = (),
    public: Callable[[Scope], bool] | None = None,
) -> ASGIApp:
    """Wrap the app in the layers of a public address: request id and record, CORS, error envelope, API keys, limits.

    The CORS layer is outside the error envelope, so that scripts of web pages can read error responses.

    Args:
        app: gets the requests that pass; its `Refused` exceptions become responses.
        policy: the limits and keys.
        observers: called with the record of every request, beside the access log.
        public: which requests need no key and have no body.
    """
    app = Guard(ApiKeys(KeyLimit(Limits(app, policy), policy.max_requests_per_key), policy.keys, public))
    if policy.cors_origins:
        app = Cors(app, policy.cors_origins)
    if policy.access_log != "off":
        observers = [*observers, AccessLog(policy.access_log)]
    return Traced(app, observers)


class Limits:
    """Pure ASGI layer that refuses requests beyond the policy: 413 and 503 for the body, 400 for a field of it.

    The body is read completely, and released when the request is done or a later layer calls `bodies.release_body`.
    The fields of a JSON object that later layers need are stored in ``scope["quantserve.json"]``. The cap on tokens is
    sent to the replica in a header, because only the replica knows the default of a request without that field.

    Args:
        app: the protected app.
        policy: the limits.
    """

    def __init__(self, app: ASGIApp, policy: Policy) -> None:
        self.app = app
        self.policy = policy
        self._parser = ThreadPoolExecutor(1, "parser")  # one: several would keep the event loop waiting
        self.buffers = Buffers(policy.max_buffered_mb * MIB)
        counted = (*TOKEN_FIELDS, *CHOICE_FIELDS, *STOP_FIELDS, *PROMPT_FIELDS, "questions", "tokens", "query")
        self._reader = FieldReader(("model", "stream", "messages", *SESSION_FIELDS, *counted))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check an HTTP request and hand it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = Body(self.buffers)
        scope = {**scope, "headers": self._headers(scope), BODY_KEY: body}
        try:
            await body.read(scope, receive, self.policy.max_body_bytes)
            if scope["method"] == "POST" and body.content:
                await self._check(scope, body)
            await self.app(scope, replay(body.content, receive), send)
        finally:
            body.release()

    async def _check(self, scope: Scope, body: Body) -> None:
        path = normalized(scope["path"])
        if is_json(scope):
            _remove_mark(scope, body)
            try:
                if len(body.content) <= INLINE:
                    fields = self._read(path, body.content)
                else:
                    fields = await asyncio.get_running_loop().run_in_executor(
                        self._parser, self._read, path, body.content
                    )
            except Refused as refused:
                if refused.error["code"] == "invalid_json" and not header(scope, b"content-type"):
                    return  # vLLM reads no body without a Content-Type
                raise
            trace_of(scope).stream = fields.get("stream") is True
            scope[JSON_KEY] = fields
        elif is_form(path, scope):
            for field, value in (await read_form(scope, body.content, (*TOKEN_FIELDS, "n"))).items():
                self._check_number(field, value, "too long" if value == math.inf else str(value))

    def _read(self, path: str, content: bytes) -> dict[str, Any]:
        """Check a JSON body; returns the fields that later layers need, of the prompt only its beginning."""
        limit = self.policy.max_json_values
        values = check_text(content, limit)
        fields = self._reader.read(content)
        if values > limit and values - sum(token_ids(fields[name]) for name in _ids(path) if name in fields) > limit:
            raise too_many_values(limit)
        self.check(path, fields)
        kept: dict[str, Any] = {name: text(fields.get(name)) for name in SESSION_FIELDS}
        for name in ("model", "stream"):
            if (raw := fields.get(name)) is not None:
                kept[name] = json.loads(bytes(raw)) if len(memoryview(raw)) <= OPENING else shown(raw)
        if (raw := fields.get("messages")) is not None and (message := first(raw)) is not None:
            kept["messages"] = [_opening(message)]
        elif (raw := fields.get("prompt")) is not None and (prompt := _opening(raw)).startswith('"'):
            kept["prompt"] = prompt
        return kept

    def check(self, path: str, fields: Mapping[str, Raw]) -> None:
        """Check the fields of a body as vLLM reads them; values that it refuses are left to it.

        Raises:
            Refused: 400, naming the field, its number and the limit.
        """
        policy = self.policy
        choices = 1
        for field in (*TOKEN_FIELDS, *CHOICE_FIELDS):
            if (raw := fields.get(field)) is not None and not (field == "max_tokens" and path.endswith(INPUT_TOKENS)):
                asked = number(raw)
                self._check_number(field, asked, shown(raw))
                choices = max(choices, int(asked)) if field in CHOICE_FIELDS else choices
        for field in STOP_FIELDS:
            raw = fields.get(field)
            if raw is not None and (count := len(items(raw, policy.max_stops))) > policy.max_stops:
                raise _too_many(field, raw, count, "items", policy.max_stops)
        for field in PROMPT_FIELDS:
            if (raw := fields.get(field)) is not None and not is_token_ids(raw):
                self._check_prompts(field, raw, len(items(raw, policy.max_prompts)), choices)
        if (raw := fields.get("questions")) is not None:
            self._check_prompts("questions", raw, objects(raw), 1)
        if (raw := fields.get("messages")) is not None:
            self._check_messages(raw, choices)

    def _check_number(self, field: str, asked: float, given: str) -> None:
        limit = self.policy.max_choices if field in CHOICE_FIELDS else self.policy.max_tokens
        if limit is not None and asked > limit:
            message = f"`{field}` is {given}; this server allows at most {limit}"
            raise Refused(400, message, param=field, code="value_above_maximum")

    def _check_prompts(self, field: str, raw: Raw, count: int, choices: int) -> None:
        limit = self.policy.max_prompts
        if count > limit:
            raise _too_many(field, raw, count, "items", limit)
        if count * choices > limit:
            raise _too_many(field, raw, count, f"items, {choices} times each", limit)

    def _check_messages(self, raw: Raw, choices: int) -> None:
        limit = self.policy.max_messages
        chats = [raw]
        if is_list_of_lists(raw):
            chats = items(raw, self.policy.max_prompts)
            self._check_prompts("messages", raw, len(chats), choices)
        for chat in chats:
            if (count := len(items(chat, limit))) > limit:
                raise _too_many("messages", chat, count, "messages", limit)

    def _headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """The headers with our token cap; a client's header of that name is removed."""
        headers = [pair for pair in scope["headers"] if pair[0].replace(b"_", b"-") != MAX_TOKENS_HEADER]
        if self.policy.max_tokens is not None:
            headers.append((MAX_TOKENS_HEADER, str(self.policy.max_tokens).encode()))
        return headers


def _remove_mark(scope: Scope, body: Body) -> None:
    """Remove UTF-8's byte order mark, which clients in .NET and PowerShell send; vLLM ignores it as well."""
    if body.content.startswith(codecs.BOM_UTF8):
        body.content = body.content[len(codecs.BOM_UTF8) :]
        length = str(len(body.content)).encode()
        headers = ((name, length if name == b"content-length" else value) for name, value in scope["headers"])
        scope["headers"] = list(headers)


def _ids(path: str) -> Sequence[str]:
    return next((fields for end, fields in TOKEN_IDS.items() if path.endswith(end)), ())


def _opening(raw: Raw) -> str:
    return bytes(memoryview(raw)[:OPENING]).decode(errors="replace")


def _too_many(field: str, raw: Raw, count: int, what: str, limit: int) -> Refused:
    about = "" if len(memoryview(raw)) <= INLINE else "at least "
    message = f"`{field}` has {about}{count} {what}; this server allows at most {limit}"
    return Refused(400, message, param=field, code="array_above_max_length")
