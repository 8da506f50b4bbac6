"""Requests and their target."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from quantserve import __version__
from quantserve.errors import UsageError


@dataclass(frozen=True)
class Target:
    """The server that requests are sent to.

    Args:
        url: ``http://host:port``, with or without a path or ``/v1``; https works too.
        model: the ``model`` of each request.
        api_key: sent as a bearer token.
        headers: further headers of every request.

    Raises:
        UsageError: the URL or the API key is invalid.
    """

    url: str
    model: str
    api_key: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        except ValueError:
            usable = False
        if not usable:
            raise UsageError(
                f"{self.url!r} is not a valid URL\n  fix: write it as http://HOST:PORT or https://HOST/PATH/v1"
            )
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UsageError(
                "the API key has characters other than printable ASCII\n  fix: copy it again, without line breaks"
            )

    @property
    def host(self) -> str:
        """Name or address."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """The URL's, or that of its scheme."""
        parts = urlsplit(self.url)
        return parts.port or (443 if parts.scheme == "https" else 80)

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""
        return urlsplit(self.url).scheme == "https"

    @property
    def root(self) -> str:
        """The path before ``/v1``, empty for most servers."""
        return urlsplit(self.url).path.rstrip("/").removesuffix("/v1")

    def head(self, method: str, path: str) -> bytes:
        """A request's head up to its last fixed header."""
        lines = [
            f"{method} {self.root}{path} HTTP/1.1",
            f"Host: {urlsplit(self.url).netloc.rpartition('@')[2]}",
            f"User-Agent: quantserve-bench/{__version__}",
            "Accept: text/event-stream, application/json",
            *([f"Authorization: Bearer {self.api_key}"] if self.api_key else []),
            *(f"{name}: {value}" for name, value in self.headers.items()),
        ]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n"


@dataclass(frozen=True)
class Request:
    """One request, chat with `messages` or completion with `prompt`.

    Attributes:
        messages: of a chat.
        prompt: text or token ids of a completion.
        max_tokens: cap of the answer.
        temperature: None leaves it to the server.
        ignore_eos: generate exactly `max_tokens` tokens (vLLM and compatible servers).
        stream: False requests the answer in one piece, without a TTFT.
        extra: further fields of the body; they override the others.
        input_tokens: prompt length in tokens according to the workload; None if unknown.
    """

    messages: Sequence[Mapping[str, Any]] | None = None
    prompt: str | Sequence[int] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    ignore_eos: bool = False
    stream: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    input_tokens: int | None = None

    @property
    def path(self) -> str:
        """The route that takes it."""
        return "/v1/completions" if self.messages is None else "/v1/chat/completions"

    def body(self, model: str) -> dict[str, Any]:
        """The JSON body."""
        body: dict[str, Any] = {"model": model, "stream": self.stream}
        if self.messages is None:
            body["prompt"] = self.prompt
        else:
            body["messages"] = self.messages
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.ignore_eos:
            body["ignore_eos"] = True
        return body | dict(self.extra)

    def encode(self, target: Target) -> bytes:
        """The encoded request."""
        body = json.dumps(self.body(target.model), ensure_ascii=False).encode()
        head = target.head("POST", self.path)
        return b"%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (head, len(body), body)
