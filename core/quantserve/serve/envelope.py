"""Converts errors of vLLM's server to OpenAI's envelope, with OpenAI's types and codes and the name of the field.

vLLM 0.32 returns an envelope of almost that shape, but with the HTTP status as ``code``, HTTP phrases as ``type``,
reprs of pydantic errors (including the client's input) as ``message``, paths such as ``body.messages.0`` as ``param``,
and exception texts for internal errors.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantserve.serve.asgi import Refused, internal_error
from quantserve.text import harmless

KEPT_HEADERS: Final = (b"allow", b"retry-after", b"www-authenticate")
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
    (re.compile("out of vocabulary"), "prompt"),
)
"""Fields of other messages without ``param``."""
PROMPTS: Final = {"completions": "prompt", "embeddings": "input", "responses": "input", "messages": "messages"}
"""By the last part of a path, the field with the prompt."""
PROMPT_NAMES: Final = frozenset({"input_text", "input_tokens", "prompt_token_ids", "prompt_tokens"})
"""vLLM's names of a prompt that is too long."""
UNREADABLE: Final = (AssertionError, AttributeError, LookupError, TypeError, RecursionError)
"""Exceptions that vLLM raises for a field of an unexpected type."""
READERS: Final = (
    ("solve_dependencies", "fastapi"),
    ("_parse_chat_message_content_part", "vllm"),
    ("construct_chat_messages_with_tool_call", "vllm"),
)
"""Functions, and their packages, that parse a request: its body, a part of a message, the items of a response."""
_LONGEST_BODY: Final = 1 << 20
_LONGEST_MESSAGE: Final = 1000
_LOGGED: Final = 4000
_EVENTS: Final = (b'data: {"error"', b"event: error")
_DETAILS: Final = re.compile(r"\s*\((?:parameter=[^\s,()]*(?:, value=.*)?|value=.*)\)\s*$", re.DOTALL)
_TOO_LONG: Final = re.compile(r"maximum context length|longer than the maximum model length", re.IGNORECASE)

logger = logging.getLogger(__name__)


class Envelope:
    """Pure ASGI layer around vLLM's app: responses with status 400 and above get OpenAI's envelope.

    The text of server errors (500 and above) is logged and not sent. Error events inside a stream are treated the same.

    Args:
        app: vLLM's app.
        is_down: whether the engine has failed for good; its errors then become 503, since Serve replaces the replica.
    """

    def __init__(self, app: ASGIApp, is_down: Callable[[], bool] = lambda: False) -> None:
        self.app = app
        self.is_down = is_down

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app and put its errors into the envelope."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start: Message | None = None
        parts: list[bytes] = []
        size = 0
        events = False

        async def enveloped(message: Message) -> None:
            nonlocal start, size, events
            if start is None:
                if message["type"] == "http.response.start":
                    if message["status"] >= 400:
                        start = message
                        return
                    events = _header(message, b"content-type").startswith(b"text/event-stream")
                elif events and (body := message.get("body", b"")).startswith(_EVENTS):
                    message = {**message, "body": self._event(scope, body)}
                await send(message)
            elif message["type"] == "http.response.body":
                body = message.get("body", b"")
                size += len(body)
                if size <= _LONGEST_BODY:
                    parts.append(body)
                if not message.get("more_body"):
                    await self._refusal(scope, start, b"".join(parts))(scope, receive, send)

        await self.app(scope, receive, enveloped)

    def _refusal(self, scope: Scope, start: Message, body: bytes) -> Response:
        status = start["status"]
        if status == 501:  # the model or server lacks the feature: a client error
            return Refused(400, "This model does not support this request.", code="not_supported").response
        if status >= 500:
            return self._hidden(scope, status, body).response
        refused = refusal(status, scope["method"], scope["path"], body)
        kept = [(key, value) for key, value in start["headers"] if key in KEPT_HEADERS]
        refused.headers = {key.decode(): value.decode("latin-1") for key, value in kept} | (refused.headers or {})
        return refused.response

    def _hidden(self, scope: Scope, status: int, body: bytes) -> Refused:
        text = body[:_LOGGED].decode(errors="replace")
        logger.error(
            "%s %s failed with status %d: %s", scope["method"], harmless(scope["path"]), status, harmless(text)
        )
        return internal_error(503 if self.is_down() else status)

    def _event(self, scope: Scope, body: bytes) -> bytes:
        """An error event of a stream; client errors keep their text, server errors do not."""
        head, _, data = body.partition(b"data: ")
        try:
            found = json.loads(data.split(b"\n", 1)[0])
            error = found["error"]
            status = error.get("code")
        except (ValueError, KeyError, TypeError, AttributeError):
            found, error, status = {}, {}, 500
        if not isinstance(status, int):  # Anthropic's events have no status
            status = 400 if error.get("type") == "invalid_request_error" else 500
        if 400 <= status < 500:
            refused = refusal(status, scope["method"], scope["path"], data.split(b"\n", 1)[0])
        else:
            refused = self._hidden(scope, status, data)
        return head + b"data: " + json.dumps({**found, "error": refused.error}).encode() + b"\n\n"


def install(app: Any) -> None:
    """Make a FastAPI app answer requests that it cannot parse with `invalid_request`; call before its first request."""
    from fastapi.exceptions import RequestValidationError
    from pydantic import ValidationError

    async def handler(request: Request, error: RequestValidationError) -> Response:
        return invalid_request(error.errors(), error.body).response

    async def later(request: Request, error: ValidationError) -> Response:
        return invalid_part(error.errors()).response

    app.add_exception_handler(RequestValidationError, handler)
    app.add_exception_handler(ValidationError, later)
    for kind in UNREADABLE:
        app.add_exception_handler(kind, _unreadable(app.exception_handlers.get(kind)))
    app.middleware_stack = None  # vLLM has built it already, with its own handlers


def _unreadable(otherwise: Callable[[Request, Any], Any] | None) -> Callable[[Request, Any], Awaitable[Response]]:
    """A handler that turns exceptions raised while a request is parsed into a 400: vLLM raises them for fields of an
    unexpected type. Exceptions raised elsewhere go to the previous handler.
    """

    async def handler(request: Request, error: Exception) -> Response:
        if not _came_up_in_reading(error):
            if otherwise is None:
                raise error
            return await otherwise(request, error)
        logger.info("%s could not be read: %r", harmless(request.url.path), error)
        message = "The request body cannot be parsed: a field has the wrong type or is empty."
        return Refused(400, message, code="invalid_type").response

    return handler


def _came_up_in_reading(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if any(code.co_name == name and package in code.co_filename for name, package in READERS):
            return True
        trace = trace.tb_next
    return False


def refusal(status: int, method: str, path: str, body: bytes) -> Refused:
    """A client error of vLLM's server (status 400 to 499) as an OpenAI error.

    Args:
        status: status of the response.
        method: of the request.
        path: of the request.
        body: body of the response.
    """
    message, param, code = _parts(body)
    if status == 404 and message in ("", "Not Found"):
        return Refused(404, f"Unknown path {path[:200]}.", code="unknown_url")
    if status == 405:
        return Refused(405, f"Method {method} is not allowed for {path[:200]}.", code="method_not_allowed")
    message = _DETAILS.sub("", message)
    if not message:
        message = PHRASES.get(status, f"The request was refused with status {status}.")
    if param:
        param = param.removeprefix("body.")
    last = path.rpartition("/")[2]
    prompt = "messages" if path.endswith("/chat/completions") else PROMPTS.get(last, "prompt")
    if status == 404:
        code = "model_not_found" if param == "model" or message.startswith("The model ") else "not_found"
        param = "model" if code == "model_not_found" else param
    elif status == 400:
        param = param or _named(message)
        if param in PROMPT_NAMES or (not param and _TOO_LONG.search(message)):
            param, code = prompt, "context_length_exceeded"
        elif param == "prompt":
            param = prompt
        elif param == "max_completion_tokens" and last in TOKEN_FIELDS:
            param = TOKEN_FIELDS[last]
            message = message.replace("max_completion_tokens", param)
        if message == "There was an error parsing the body":
            message, code = "The request body is not valid JSON: it cannot be decoded.", "invalid_json"
        code = code or ("invalid_value" if param else None)
    return Refused(status, _shortened(message), param=param or None, code=code)


def invalid_request(errors: Sequence[Any], body: object = None) -> Refused:
    """FastAPI's validation errors of a request as one OpenAI error, without the client's input.

    Args:
        errors: pydantic's, or plain texts.
        body: the parsed request body.
    """
    found: list[_Problem] = []
    for error in errors:
        if not isinstance(error, Mapping):
            if "media type" in (text := str(error)).lower():
                message = "The body must be JSON, with the header `Content-Type: application/json`."
                return Refused(415, message, code="unsupported_media_type")
            found.append(_Problem("", text, "invalid_value"))
        elif error["type"] == "json_invalid":
            reason = (error.get("ctx") or {}).get("error", "it cannot be decoded")
            where = next((f" at character {part}" for part in error["loc"] if isinstance(part, int)), "")
            return Refused(400, f"The request body is not valid JSON: {reason}{where}.", code="invalid_json")
        else:
            found.append(_problem(error, body))
    problems: dict[str, list[_Problem]] = {}
    for problem in _likeliest(found):
        if problem not in (same := problems.setdefault(problem.param, [])):
            same.append(problem)
    if not problems:
        return Refused(400, "The request is invalid.", code="invalid_value")
    texts = [_sentence(param, list(dict.fromkeys(p.text for p in same))) for param, same in list(problems.items())[:5]]
    more = f"; and {len(problems) - 5} more fields" if len(problems) > 5 else ""
    param, same = next(iter(problems.items()))
    return Refused(400, _shortened("; ".join(texts) + more), param=param or None, code=same[0].code)


def invalid_part(errors: Sequence[Any]) -> Refused:
    """Validation errors of a part of a request that vLLM validates later, during processing."""
    names = {error["loc"][0] for error in errors if error["loc"] and isinstance(error["loc"][0], str)}
    refused = invalid_request(errors, dict.fromkeys(names))
    if not names and errors and errors[0]["loc"]:
        text = _problem(errors[0], None).text
        return Refused(
            400, _shortened(f"Item {errors[0]['loc'][0]} of a list in the request {text}"), code="invalid_type"
        )
    return refused


@dataclass(frozen=True)
class _Problem:
    """One of pydantic's errors.

    Attributes:
        param: the field.
        text: what is wrong with it.
        code: OpenAI's.
        constant: whether a constant such as a role was expected.
        missing: whether the field is missing.
        branches: for each union on the path to the field, outermost first: its path and the branch of this error.
    """

    param: str
    text: str
    code: str
    constant: bool = False
    missing: bool = False
    branches: tuple[tuple[str, str], ...] = ()


def _problem(error: Mapping[str, Any], body: object) -> _Problem:
    kind = error["type"]
    missing = kind == "missing"
    param, branches = _field(error["loc"], body, missing)
    cause = (error.get("ctx") or {}).get("error")
    if own := getattr(cause, "parameter", None):
        param = str(own)
    if missing:
        text, code = "is missing", "missing_required_parameter"
    elif kind == "extra_forbidden":
        text, code = "is not known", "unknown_parameter"
    elif kind in ("model_type", "model_attributes_type", "dict_type", "dataclass_type"):
        text, code = "must be an object", "invalid_type"
    else:
        text = _DETAILS.sub("", str(cause)) if isinstance(cause, Exception) else str(error.get("msg", "is invalid"))
        text = text.removeprefix("Value error, ").replace("Input should be", "must be").replace("Input ", "value ")
        wrong_type = kind.endswith(("_type", "_parsing", "_instance_of")) or kind == "int_from_float"
        code = "invalid_type" if wrong_type else "invalid_value"
    return _Problem(param, text, code, kind == "literal_error", missing, branches)


def _likeliest(found: Sequence[_Problem]) -> list[_Problem]:
    """The errors of the most likely branch of each union.

    For a union pydantic reports the errors of every branch: eleven for a message without a role. The most likely branch
    is the one of the right type, then with the right constants, then with the fewest missing fields, then with the
    fewest errors.
    """
    left = list(found)
    for level in range(max((len(problem.branches) for problem in found), default=0)):
        badness: dict[object, dict[str, list[int]]] = {}
        for problem in left:
            if level < len(problem.branches):
                union, branch = problem.branches[level]
                counts = badness.setdefault((problem.branches[:level], union), {}).setdefault(branch, [0, 0, 0, 0])
                counts[0] |= problem.code == "invalid_type" and problem.param == union
                counts[1] += problem.constant
                counts[2] += problem.missing
                counts[3] += 1
        best = {union: min(branches.values()) for union, branches in badness.items()}
        left = [
            problem
            for problem in left
            if level >= len(problem.branches)
            or badness[key := (problem.branches[:level], problem.branches[level][0])][problem.branches[level][1]]
            == best[key]
        ]
    return left


def _field(location: Iterable[object], body: object, missing: bool) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The path to a field in the client's notation, ``messages[0].role``, and the union branches on that path.

    pydantic's locations also contain names of union branches and validators. Keys and indices of the client's body
    belong to the path; a missing field is not in the body, and is always the last part.
    """
    path = ""
    branches: list[tuple[str, str]] = []
    value = body
    parts = [part for part in location if part != "body"]
    for index, part in enumerate(parts):
        if isinstance(part, int) and isinstance(value, list) and part < len(value):
            path += f"[{part}]"
            value = value[part]
        elif (
            isinstance(part, str)
            and isinstance(value, Mapping)
            and (part in value or (missing and index == len(parts) - 1))
        ):
            path += f".{part}" if path else part
            value = value.get(part)
        else:
            branches.append((path, str(part)))
    return path, tuple(branches)


def _sentence(param: str, texts: Sequence[str]) -> str:
    text = " or ".join(texts[:4]) + (" or ..." if len(texts) > 4 else "")
    if not param:
        return f"The request body {text}" if text.startswith(("is ", "must ")) else text
    return f"`{param}` {text}" if text.startswith(("is ", "must ")) else f"`{param}`: {text}"


def _parts(body: bytes) -> tuple[str, str | None, str | None]:
    """Message, param and code of an error in any of the formats of vLLM's routes."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        # Short plain text is a message for people; HTML and the like is not.
        text = body[:_LONGEST_MESSAGE].decode(errors="replace").strip()
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


def _named(message: str) -> str | None:
    """The field of a message without ``param``."""
    if match := NAMED.match(message):
        return match[1]
    return next((param for pattern, param in HINTS if pattern.search(message)), None)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + "..."


def _header(message: Message, name: bytes) -> bytes:
    return next((bytes(value) for key, value in message.get("headers", ()) if key.lower() == name), b"")
