"""A server with OpenAI's API whose models answer by rules, for the tests of the client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from bench.tests.fake_server import DONE, END, FINISH, ROLE, FakeServer, Step, chunk, delta, head, usage, whole

Reply = Callable[[str, dict[str, Any]], str | Iterable[Step]]
"""From the last message and the body to the text of the answer, or to the steps of the response."""


class StandIn(FakeServer):
    """Answers ``/v1/models``, chats and completions; a context manager.

    Args:
        models: id -> its reply.
        key: the only key that is accepted; None for all requests.
        others: path -> what a GET request gets instead of 404.
    """

    def __init__(self, models: dict[str, Reply], key: str | None = None, others: dict[str, Any] | None = None) -> None:
        super().__init__(self._respond)
        self.models = models
        self.key = key
        self.others = others or {}
        self.asked: list[dict[str, Any]] = []

    def _respond(self, number: int, body: dict[str, Any]) -> Iterable[Step]:
        first, *headers = self.exchanges[number].head.split("\r\n")
        path = first.split(" ")[1]
        if self.key and f"authorization: bearer {self.key}" not in [line.lower() for line in headers]:
            return [whole(401, error("invalid API key", "invalid_api_key"))]
        if path in self.others:
            return [whole(200, self.others[path])]
        if path == "/v1/models":
            return [whole(200, {"object": "list", "data": [{"id": name, "owned_by": "tests"} for name in self.models]})]
        if path not in ("/v1/chat/completions", "/v1/completions"):
            return [whole(404, error(f"unknown path {path}", "unknown_url"))]
        self.asked.append(body)
        if body["model"] not in self.models:
            return [whole(404, error(f"no model {body['model']}", "model_not_found"))]
        said = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        reply = self.models[body["model"]](said, body)
        if not isinstance(reply, str):
            return reply
        return streamed(reply) if body["stream"] else [whole(200, answer(reply))]


def streamed(text: str, delay: float = 0.0) -> Iterator[Step]:
    """A chat whose events are the words of a text."""
    words = text.split(" ")
    pieces = [word if index == len(words) - 1 else f"{word} " for index, word in enumerate(words)]
    yield head()
    yield chunk(ROLE)
    for piece in pieces:
        yield chunk(delta(content=piece))
        yield delay
    yield chunk(FINISH) + chunk(usage(7, len(pieces))) + chunk(DONE) + END


def answer(text: str) -> dict[str, Any]:
    return {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": len(text.split(" "))},
    }


def error(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
