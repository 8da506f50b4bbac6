"""Puts the errors of vLLM's server into OpenAI's envelope, with OpenAI's types and codes and the name of the field."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantserve.serve.asgi import Refused, internal_error
from quantserve.serve.replica.vllm.errors import refusal
from quantserve.serve.replica.vllm.validation_errors import invalid_request, wrong_fields
from quantserve.text import harmless

KEPT_HEADERS: Final = (b"allow", b"retry-after", b"www-authenticate")
UNREADABLE: Final = (AssertionError, AttributeError, LookupError, TypeError, RecursionError)
"""Exceptions that vLLM raises for a field of an unexpected type."""
READERS: Final = (
    ("solve_dependencies", "fastapi"),
    ("_parse_chat_message_content_part", "vllm"),
    ("construct_chat_messages_with_tool_call", "vllm"),
)
"""Functions, and their packages, that parse a request: its body, a part of a message, the items of a response."""
CONTENTS: Final = ("messages", "input", "prompt")
"""Fields with parts that vLLM parses itself."""
BODY: Final = "quantserve.body"
"""Key of the ASGI scope: the `SentBody` of a request."""
_LONGEST_BODY: Final = 1 << 20
_LOGGED: Final = 4000
_EVENTS: Final = (b'data: {"error"', b"event: error")

logger = logging.getLogger(__name__)


class SentBody:
    """A request's body as its app receives it, kept until the response begins."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._chunks: list[bytes] = []

    async def receive(self) -> Message:
        """The ASGI receive channel of the app."""
        message = await self._receive()
        if chunk := message.get("body", b""):
            self._chunks.append(chunk)
        return message

    def parsed(self) -> Any:
        """The parsed body; None if it is not JSON."""
        try:
            return json.loads(b"".join(self._chunks))
        except (ValueError, RecursionError):
            return None

    def drop(self) -> None:
        """Free the body."""
        self._chunks.clear()


class Envelope:
    """Pure ASGI layer around vLLM's app: responses with status 400 and above get OpenAI's envelope.

    The text of server errors (500 and above) is logged and not sent. A stream whose first event is an error becomes a
    response with the status of that error. Error events later in a stream get the same envelope.

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
        sent = SentBody(receive)
        scope = {**scope, BODY: sent}
        held: Message | None = None
        parts: list[bytes] = []
        size = 0
        events = refused = False

        async def enveloped(message: Message) -> None:
            nonlocal held, size, events, refused
            if refused:
                return
            if message["type"] == "http.response.start":
                events = message["status"] < 400 and _header(message, b"content-type").startswith(b"text/event-stream")
                if events or message["status"] >= 400:
                    held = message
                else:
                    sent.drop()
                    await send(message)
                return
            body = message.get("body", b"")
            if events and body.startswith(_EVENTS):
                event = _ErrorEvent(body)
                if held is not None:
                    refused = True
                    await self._refusal(scope, {**held, "status": event.status}, event.data)(scope, receive, send)
                    return
                message = {**message, "body": event.with_error(self._refused(scope, event.status, event.data).error)}
            elif held is not None and not events:
                size += len(body)
                if size <= _LONGEST_BODY:
                    parts.append(body)
                if not message.get("more_body"):
                    await self._refusal(scope, held, b"".join(parts))(scope, receive, send)
                return
            if held is not None:
                sent.drop()
                start, held = held, None
                await send(start)
            await send(message)

        await self.app(scope, sent.receive, enveloped)

    def _refusal(self, scope: Scope, start: Message, body: bytes) -> Response:
        refused = self._refused(scope, start["status"], body)
        kept = [(key, value) for key, value in start["headers"] if key in KEPT_HEADERS]
        refused.headers = {key.decode(): value.decode("latin-1") for key, value in kept} | (refused.headers or {})
        return refused.response

    def _refused(self, scope: Scope, status: int, body: bytes) -> Refused:
        if status == 501:  # the model or server lacks the feature: a client error
            return Refused(400, "This model does not support this request.", code="not_supported")
        if status < 500:
            return refusal(status, scope["method"], scope["path"], body, scope[BODY].parsed())
        text = body[:_LOGGED].decode(errors="replace")
        logger.error(
            "%s %s failed with status %d: %s", scope["method"], harmless(scope["path"]), status, harmless(text)
        )
        return internal_error(503 if self.is_down() else status)


class _ErrorEvent:
    """An error event of a stream.

    Attributes:
        data: its JSON.
        status: of the error; Anthropic's events have none.
    """

    def __init__(self, event: bytes) -> None:
        self._head, _, data = event.partition(b"data: ")
        self.data = data.split(b"\n", 1)[0]
        try:
            self._found = json.loads(self.data)
            status, kind = self._found["error"].get("code"), self._found["error"].get("type")
        except (ValueError, KeyError, TypeError, AttributeError):
            self._found, status, kind = {}, 500, None
        if not isinstance(status, int) or not 400 <= status < 600:
            status = 400 if kind == "invalid_request_error" else 500
        self.status: int = status

    def with_error(self, error: Mapping[str, Any]) -> bytes:
        """The event with another error."""
        return self._head + b"data: " + json.dumps({**self._found, "error": error}).encode() + b"\n\n"


def install(app: Any) -> None:
    """Make a FastAPI app answer requests that it cannot parse with `invalid_request`; call before its first request."""
    from fastapi.exceptions import RequestValidationError
    from pydantic import ValidationError

    async def handler(request: Request, error: RequestValidationError) -> Response:
        return invalid_request(error.errors(), _client_body(request)).response

    async def later(request: Request, error: ValidationError) -> Response:
        return invalid_request(error.errors(), _client_body(request)).response

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
        if not _raised_by_reader(error):
            if otherwise is None:
                raise error
            return await otherwise(request, error)
        logger.info("%s could not be read: %r", harmless(request.url.path), error)
        body = _client_body(request)
        if errors := wrong_fields(request.scope.get("endpoint"), body):
            return invalid_request(errors, body).response
        field = next((name for name in CONTENTS if isinstance(body, Mapping) and name in body), None)
        subject = f"`{field}`" if field else "The request body"
        message = f"{subject} cannot be parsed: a part of it has the wrong type or is empty."
        return Refused(400, message, param=field, code="invalid_type").response

    return handler


def _client_body(request: Request) -> Any:
    """The parsed body of a request as the client sent it; vLLM's validators change the one that they get."""
    sent = request.scope.get(BODY)
    return sent.parsed() if sent else None


def _raised_by_reader(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if any(code.co_name == name and package in code.co_filename for name, package in READERS):
            return True
        trace = trace.tb_next
    return False


def _header(message: Message, name: bytes) -> bytes:
    return next((bytes(value) for key, value in message.get("headers", ()) if key.lower() == name), b"")
