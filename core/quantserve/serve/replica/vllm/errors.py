"""Converts the error bodies of vLLM's server to OpenAI's, with the client's name of the field.

vLLM 0.32 returns an envelope of almost that shape, but with the HTTP status as ``code``, HTTP phrases as ``type``, and
paths such as ``body.messages.0``, names of its own or nothing as ``param``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final

from quantserve.serve.asgi import Refused
from quantserve.serve.replica.vllm.client_fields import Path, known, mentioned, written
from quantserve.serve.replica.vllm.validation_errors import DETAILS, LONGEST, shortened

PHRASES: Final = {status.value: status.phrase for status in HTTPStatus}
TOKEN_FIELDS: Final = {"messages": "max_tokens", "responses": "max_output_tokens"}
"""By the last part of a path, the client's name of vLLM's ``max_completion_tokens``."""
NAMED: Final = re.compile(
    r"(n|best_of|stop|seed|(?:min|max|max_completion)_tokens|top_[pk]|min_p|temperature|\w+_penalty|logprobs|"
    r"prompt_logprobs|stop_token_ids|bad_words|allowed_token_ids|logit_bias)\b[^.]* (?:must|cannot|can only) "
)
"""Messages of vLLM without ``param`` that begin with the name of the field."""
HINTS: Final = (
    (re.compile("empty conversation|not a multimodal model"), "messages"),
    (re.compile("tool choice"), "tool_choice"),
    (re.compile("^Chat template is passed"), "chat_template"),
    (re.compile("jinja2|got multiple values for keyword"), "chat_template_kwargs"),
    (re.compile("base64"), "prompt_embeds"),
    (re.compile("label_token_id "), "label_token_ids"),
    (re.compile("out of vocabulary|has no embedding|prompt cannot be empty"), "prompt"),
    (re.compile(r"(?i)\bgrammar\b|json schema|structural tag|\bregex\b"), "structured_outputs"),
)
"""Fields of other messages without ``param``."""
PROMPTS: Final = {"completions": "prompt", "embeddings": "input", "responses": "input"}
"""By the last part of a path, the field with the prompt; ``messages`` for the others with messages."""
PROMPT_FIELDS: Final = ("kv_transfer_params", "prompt", "messages", "input", "query", "items", "documents", "tokens")
"""Fields that can hold a prompt."""
PROMPT_NAMES: Final = frozenset({"input_text", "input_tokens", "prompt_token_ids", "prompt_tokens"})
"""vLLM's names of a prompt that is too long."""
ALIASES: Final[Mapping[str, tuple[str, ...]]] = {
    "max_completion_tokens": ("max_completion_tokens", "max_tokens", "max_output_tokens"),
    "max_tokens": ("max_tokens", "max_output_tokens", "max_completion_tokens"),
    "logprobs": ("top_logprobs", "logprobs"),
    "extra_args": ("vllm_xargs", "kv_transfer_params"),
    "response_id": ("previous_response_id",),
}
"""vLLM's names of fields, and the client's."""
SCHEMAS: Final[tuple[Path, ...]] = (
    *(("structured_outputs", kind) for kind in ("json", "regex", "choice", "grammar", "structural_tag")),
    ("structured_outputs",),
    ("response_format", "json_schema", "schema"),
    ("response_format",),
    ("text", "format", "schema"),
    ("output_config", "format", "schema"),
    ("output_format", "schema"),
    ("guided_json",),
    ("tools", 0, "function", "parameters"),
    ("tools", 0, "input_schema"),
    ("tools", 0, "parameters"),
)
"""Places of a schema or grammar in a request, in the order in which vLLM uses them."""
_TOO_LONG: Final = re.compile(r"maximum context length|longer than the maximum model length", re.IGNORECASE)
_TOKEN: Final = re.compile(r"[Tt]oken id (-?\d+)")


def refusal(status: int, method: str, path: str, body: bytes, client: Any = None) -> Refused:
    """A client error of vLLM's server (status 400 to 499) as an OpenAI error.

    Args:
        status: status of the response.
        method: of the request.
        path: of the request.
        body: of the response.
        client: the client's parsed body.
    """
    message, param, code = _parts(body)
    if status == 400 and code:  # made here, while the request was parsed
        return Refused(status, message, param=param, code=code)
    if status == 404 and message in ("", "Not Found"):
        return Refused(404, f"Unknown path {path[:200]}.", code="unknown_url")
    if status == 405:
        return Refused(405, f"Method {method} is not allowed for {path[:200]}.", code="method_not_allowed")
    message = DETAILS.sub("", message) or PHRASES.get(status, f"The request was refused with status {status}.")
    given = client if isinstance(client, Mapping) else {}
    if param:
        param = param.removeprefix("body.")
    if status == 404:
        code = "model_not_found" if param == "model" or message.startswith("The model ") else "not_found"
        param = "model" if code == "model_not_found" else _own_name(param, given)
    elif status == 400:
        param = param or _named(message, given)
        if param in PROMPT_NAMES or (not param and _TOO_LONG.search(message)):
            param, code = _prompt(path, message, given), "context_length_exceeded"
        elif param == "prompt" or (param == "messages" and param not in given):
            param = _prompt(path, message, given)
        elif param == "structured_outputs":
            param = schema_field(given)
        elif param:
            own = _own_name(param, given)
            if own == "max_completion_tokens" and own not in given:
                own = TOKEN_FIELDS.get(path.rpartition("/")[2], own)
            message, param = message.replace(param, own) if param in ALIASES else message, own
        if message == "There was an error parsing the body":
            message, code = "The request body is not valid JSON: it cannot be decoded.", "invalid_json"
        code = code or ("invalid_value" if param else None)
    if param and isinstance(client, Mapping):
        param = known(param, client)
    return Refused(status, shortened(message), param=param or None, code=code)


def schema_field(client: Mapping[str, Any]) -> str:
    """The field with the schema or grammar of a request."""
    tools = client.get("tools")
    name = _at(client, ("tool_choice", "name")) or _at(client, ("tool_choice", "function", "name"))
    used = [index for index, tool in enumerate(tools if isinstance(tools, list) else ()) if _is_tool(tool, name)]
    for path in SCHEMAS:
        path = tuple(used[0] if part == 0 and used else part for part in path)
        if _at(client, path) is not None:
            return "tools" if path[0] == "tools" and len(used) > 1 else written(path)
    return "structured_outputs"


def _is_tool(tool: Any, name: object) -> bool:
    return name is None or name in (_at(tool, ("name",)), _at(tool, ("function", "name")))


def _at(value: Any, path: Path) -> Any:
    for part in path:
        if isinstance(part, str) and isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(part, int) and isinstance(value, list) and part < len(value):
            value = value[part]
        else:
            return None
    return value


def _own_name(param: str | None, client: Mapping[str, Any]) -> str:
    """The client's name of a field."""
    if not param or param in client:
        names = ALIASES.get(param or "", ())[:1] if param == "logprobs" else ()
    else:
        names = ALIASES.get(param, ())
    return next((name for name in names if client.get(name)), param or "")


def _prompt(path: str, message: str, client: Mapping[str, Any]) -> str:
    """The field with the prompt; if the client sent token ids, with the position of the one in the message."""
    if match := _TOKEN.search(message):
        for name in PROMPT_FIELDS:
            for found, value in _ids(client.get(name)):
                if value == int(match[1]):
                    return written((name, *found))
    last = path.rpartition("/")[2]
    usual = "messages" if path.endswith(("/chat/completions", "/messages", "/batch")) else PROMPTS.get(last, "prompt")
    return next((name for name in (usual, *PROMPT_FIELDS[1:]) if name in client), usual)


def _ids(value: Any) -> Iterator[tuple[Path, int]]:
    """Paths and values of the numbers in a list, or in the lists in it, or under ``prompt_token_ids``."""
    start: Path = ()
    if isinstance(value, Mapping):
        start, value = ("prompt_token_ids",), value.get("prompt_token_ids")
    for index, part in enumerate(value if isinstance(value, list) else ()):
        if isinstance(part, int):
            yield (*start, index), part
        elif isinstance(part, list):
            yield from (((*start, index, inner), one) for inner, one in enumerate(part) if isinstance(one, int))


def _named(message: str, client: Mapping[str, Any]) -> str | None:
    """The field of a message without ``param``: one of the client's that the message mentions, or a usual one."""
    if own := mentioned(message[:LONGEST], client):
        return own
    if match := NAMED.match(message):
        return match[1]
    return next((param for pattern, param in HINTS if pattern.search(message)), None)


def _parts(body: bytes) -> tuple[str, str | None, str | None]:
    """Message, param and code of an error in any of the formats of vLLM's routes."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        # Short plain text is a message for people; HTML and the like is not.
        text = body[:LONGEST].decode(errors="replace").strip()
        return ("" if text.startswith(("<", "{", "[")) else text), None, None
    if isinstance(found, str):
        return found, None, None
    if not isinstance(found, Mapping):
        return "", None, None
    error = found.get("error", found)
    if isinstance(error, str):
        return error, None, None
    if not isinstance(error, Mapping):
        return "", None, None
    message = next((value for key in ("message", "detail") if isinstance(value := error.get(key), str)), "")
    param, code = error.get("param"), error.get("code")
    return message, param if isinstance(param, str) else None, code if isinstance(code, str) else None
