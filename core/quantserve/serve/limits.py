"""Request limits: the policy as plain data, the layer that enforces it, and the order of all public layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from pydantic import ConfigDict
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantserve.config.schema import HttpLimits
from quantserve.serve.access_log import AccessLog, check_destination
from quantserve.serve.asgi import Guard, Refused, header, is_json, parse_object, read_body, replay
from quantserve.serve.cors import Cors
from quantserve.serve.keys import ApiKeys, KeySet, load_key_set
from quantserve.serve.request_defaults import MAX_TOKENS_HEADER
from quantserve.serve.trace import Observer, Traced, trace_of

if TYPE_CHECKING:
    from quantserve.config import HttpConfig

MIB: Final = 1 << 20
JSON_KEY: Final = "quantserve.json"
"""Where an ASGI scope holds the JSON object of its body, so that no later layer parses it again."""
TOKEN_FIELDS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")
CHOICE_FIELDS: Final = ("n", "best_of")
STOP_FIELDS: Final = ("stop", "stop_sequences", "stop_token_ids")
PROMPT_FIELDS: Final = ("prompt", "input", "documents")
_SUSPECT: Final = re.compile(rb"\d{19}|\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
"""Byte patterns without which a body has no number beyond 64 bits and no unpaired surrogate."""
_WITH_BODY: Final = ("POST", "PUT", "PATCH", "DELETE")


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


def layers(app: ASGIApp, policy: Policy, observers: Sequence[Observer] = ()) -> ASGIApp:
    """Wrap the app in the layers of a public address: request id and record, CORS, error envelope, API keys, limits.

    The CORS layer is outside the error envelope, so that scripts of web pages can read error responses.

    Args:
        app: gets the requests that pass; its `Refused` exceptions become responses.
        policy: the limits and keys.
        observers: called with the record of every request, beside the access log.
    """
    app = Guard(ApiKeys(Limits(app, policy), policy.keys))
    if policy.cors_origins:
        app = Cors(app, policy.cors_origins)
    if policy.access_log != "off":
        observers = [*observers, AccessLog(policy.access_log)]
    return Traced(app, observers)


class Limits:
    """Pure ASGI layer that refuses requests beyond the policy: 413 for the body, 400 for a field of it.

    A JSON body is read completely and parsed once; the object is stored in ``scope["quantserve.json"]``. Other bodies
    are streamed and counted. The cap on tokens is sent to the replica in a header, because only the replica knows the
    default of a request without that field.

    Args:
        app: the protected app.
        policy: the limits.
    """

    def __init__(self, app: ASGIApp, policy: Policy) -> None:
        self.app = app
        self.policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check an HTTP request and hand it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.policy.max_body_bytes
        declared = header(scope, b"content-length")
        if declared.isdigit() and int(declared[:20]) > limit:
            raise _too_large(limit, int(declared[:20]))
        scope = self._with_cap(scope)
        if scope["method"] not in _WITH_BODY:
            await self.app(scope, receive, send)
        elif scope["method"] == "POST" and is_json(scope):
            body = await self._read(receive)
            if (parsed := _parse(scope, body)) is not None:
                self.check(parsed)
                if _SUSPECT.search(body):
                    _check_values(parsed)
                trace_of(scope).stream = parsed.get("stream") is True
                scope[JSON_KEY] = parsed
            await self.app(scope, replay(body, receive), send)
        else:
            await self.app(scope, _counted(receive, limit), send)

    def check(self, body: Mapping[str, Any]) -> None:
        """Check the fields of a body; fields of the wrong type are left to the model's server.

        Raises:
            Refused: 400, naming the field, its number and the limit.
        """
        policy = self.policy
        messages = body.get("messages")
        if isinstance(messages, list) and len(messages) > policy.max_messages:
            raise _too_many("messages", f"has {len(messages)} messages", policy.max_messages)
        for field in STOP_FIELDS:
            if isinstance(stops := body.get(field), list) and len(stops) > policy.max_stops:
                raise _too_many(field, f"has {len(stops)} items", policy.max_stops)
        if policy.max_tokens is not None:
            for field in TOKEN_FIELDS:
                if _number(asked := body.get(field)) > policy.max_tokens:
                    raise _too_much(field, asked, policy.max_tokens)
        choices = 1
        for field in CHOICE_FIELDS:
            if _number(asked := body.get(field)) > policy.max_choices:
                raise _too_much(field, asked, policy.max_choices)
            choices = max(choices, int(_number(asked)))
        for field in PROMPT_FIELDS:
            count = _prompts(body.get(field))
            if count > policy.max_prompts:
                raise _too_many(field, f"has {count} items", policy.max_prompts)
            if count * choices > policy.max_prompts:
                raise _too_many(field, f"has {count} items, {choices} times each", policy.max_prompts)

    async def _read(self, receive: Receive) -> bytes:
        limit = self.policy.max_body_bytes
        try:
            return await read_body(receive, limit)
        except Refused as refused:
            raise _too_large(limit) from refused

    def _with_cap(self, scope: Scope) -> Scope:
        """The scope with our token cap in its headers; a client's header of that name is removed."""
        headers = [pair for pair in scope["headers"] if pair[0] != MAX_TOKENS_HEADER]
        if self.policy.max_tokens is not None:
            headers.append((MAX_TOKENS_HEADER, str(self.policy.max_tokens).encode()))
        return {**scope, "headers": headers}


def _parse(scope: Scope, body: bytes) -> dict[str, Any] | None:
    """The JSON object of a body; None for an empty body, and for one that is no JSON and has no Content-Type."""
    if not body:
        return None
    try:
        return parse_object(body)
    except Refused:
        if header(scope, b"content-type"):
            raise
        return None


def _check_values(body: Mapping[str, Any]) -> None:
    """Refuse values that vLLM cannot send to its engine, for which it would answer 500.

    Raises:
        Refused: 400, an integer does not fit into 64 bits, or a string is not valid Unicode.
    """
    for field, value in body.items():
        left = [field, value]
        while left:
            found = left.pop()
            if isinstance(found, Mapping):
                left += [*found, *found.values()]
            elif isinstance(found, list):
                left += found
            elif isinstance(found, int) and not -(2**63) <= found < 2**64:
                raise _unusable(field, f"the number {str(found)[:40]}, which does not fit into 64 bits.")
            elif isinstance(found, str) and not _is_unicode(found):
                raise _unusable(field, "text that is not valid Unicode (an unpaired surrogate).")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unusable(field: str, has: str) -> Refused:
    shown = field[:100].encode("ascii", "backslashreplace").decode()
    return Refused(400, f"`{shown}` has {has}", param=shown, code="invalid_value")


def _counted(receive: Receive, limit: int) -> Receive:
    """A receive channel that raises when the body exceeds the limit."""
    size = 0

    async def channel() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise _too_large(limit)
        return message

    return channel


def _prompts(value: object) -> int:
    """Number of prompts in ``prompt`` or ``input``: a list of token ids is one prompt, a list of texts several."""
    if not isinstance(value, list):
        return 1
    return 1 if value and isinstance(value[0], int) else len(value)


def _number(value: object) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else 0


def _too_much(field: str, asked: object, limit: int) -> Refused:
    message = f"`{field}` is {str(asked)[:40]}; this server allows at most {limit}"
    return Refused(400, message, param=field, code="value_above_maximum")


def _too_many(field: str, has: str, limit: int) -> Refused:
    message = f"`{field}` {has}; this server allows at most {limit}"
    return Refused(400, message, param=field, code="array_above_max_length")


def _too_large(limit: int, size: int | None = None) -> Refused:
    has = "" if size is None else f"{size} bytes, "
    message = f"Request body too large: {has}the limit is {limit} bytes ({limit / MIB:g} MiB)."
    return Refused(413, message, code="request_too_large")
