"""A client for ASGI apps in this process, and apps that stand upstream."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantserve.serve.asgi import Guard, request_scope


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        assert list(self.json) == ["error"]
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        return dict(self.json["error"])


async def request(
    app: ASGIApp,
    method: str,
    path: str,
    body: object = None,
    *,
    headers: dict[str, str] | None = None,
    root_path: str = "",
    parts: int = 1,
    leave_after: int | None = None,
    answer: Answer | None = None,
) -> Answer:
    """Send one request.

    Args:
        body: bytes, or what is sent as JSON.
        leave_after: disconnect after that many body chunks.
        answer: is filled as the response arrives, and returned.
    """
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    given = {"content-type": "application/json", **(headers or {})}
    scope = request_scope(method, path, [(key.encode(), value.encode()) for key, value in given.items()])
    scope["root_path"] = root_path
    size = max(1, -(-len(content) // parts))
    pieces = [content[start : start + size] for start in range(0, len(content), size)] or [b""]
    messages: list[Message] = [
        {"type": "http.request", "body": piece, "more_body": index < len(pieces) - 1}
        for index, piece in enumerate(pieces)
    ]
    gone = asyncio.Event()
    answer = answer or Answer()

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {key.decode(): value.decode() for key, value in message["headers"]}
        else:
            answer.chunks.append(message.get("body", b""))
            if leave_after is not None and len([chunk for chunk in answer.chunks if chunk]) >= leave_after:
                gone.set()

    await asyncio.wait_for(Guard(app)(scope, receive, send), 120)
    return answer


class Upstream:
    """An app that returns what it received."""

    def __init__(self, name: str, status: int = 200, healthy: bool = True) -> None:
        self.name = name
        self.status = status
        self.healthy = healthy
        self.bodies: list[bytes] = []
        self.paths: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        status = self.status
        if scope["path"] == "/health":
            status = 200 if self.healthy else 503
        else:
            self.bodies.append(body)
            self.paths.append(scope["path"])
        headers = [(b"content-type", b"application/json"), (b"x-upstream", self.name.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"from": ', "more_body": True})
        await send({"type": "http.response.body", "body": json.dumps(self.name).encode() + b"}"})
