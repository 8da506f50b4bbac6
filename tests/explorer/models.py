"""A replica's app that speaks vLLM's streaming API with prepared tokens and distributions."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.types import Receive, Scope, Send

from quantserve.serve.asgi import read_body

ANSWER = (
    "Concatenate any number of strings.\n\nThe string whose method is called is inserted in between each given string. "
    "The result is returned as a new string."
)
NO_TEMPLATE = "Cannot use chat template functions because tokenizer.chat_template is not set."


def words(text: str) -> list[str]:
    """The text in tokens: words with the white space before them, and punctuation."""
    return re.findall(r"\s*\w+|\s*[^\w\s]", text)


class FakeModel:
    """Answers every prompt with the same tokens.

    Args:
        text: of the answer.
        sure: probability of every token.
        rivals: probabilities of other tokens, by the index of a token.
        template: whether it has a chat template.
        interval_s: seconds between tokens.
        die_after: ends the connection after so many tokens.
    """

    def __init__(
        self,
        text: str = ANSWER,
        sure: float = 0.9,
        rivals: dict[int, dict[str, float]] | None = None,
        template: bool = True,
        interval_s: float = 0.002,
    ) -> None:
        self.tokens = words(text) or [text]
        self.sure, self.rivals, self.template, self.interval_s = sure, rivals or {}, template, interval_s
        self.die_after: int | None = None
        self.bodies: list[dict[str, Any]] = []
        self.running = 0
        self.served: list[tuple[float, float, int]] = []
        self.cancelled = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path == "/metrics":
            await respond(send, 200, "\n".join(self._metrics()).encode(), b"text/plain")
        elif path == "/v1/chat/completions" and not self.template:
            await read_body(receive)
            await self._refuse(send, NO_TEMPLATE)
        elif path in ("/v1/chat/completions", "/v1/completions"):
            await self._complete(path.endswith("chat/completions"), json.loads(await read_body(receive)), receive, send)
        else:
            await respond(send, 200, b"{}")

    async def _complete(self, chat: bool, body: dict[str, Any], receive: Receive, send: Send) -> None:
        self.bodies.append(body)
        self.running += 1
        leaving = asyncio.ensure_future(receive())
        try:
            await send({
                "type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")],
            })  # fmt: skip
            for index, event in enumerate(self._events(chat, body)):
                if self.die_after is not None and index > self.die_after:
                    raise ConnectionError("dead")
                await asyncio.sleep(self.interval_s)
                if leaving.done():
                    self.cancelled += 1
                    return
                await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": True})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
            self.served.append((self.interval_s, self.interval_s, len(self.tokens)))
        finally:
            leaving.cancel()
            self.running -= 1

    def _events(self, chat: bool, body: dict[str, Any]) -> Iterator[bytes]:
        tokens = self.tokens[: body.get("max_tokens") or 16]
        cut = len(tokens) < len(self.tokens)
        if chat:
            yield self._chunk(body, {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
        for index, token in enumerate(tokens):
            top = self._top(index, token)
            last = index == len(tokens) - 1
            choice: dict[str, Any] = {"index": 0, "finish_reason": ("length" if cut else "stop") if last else None}
            choice |= {"delta": {"content": token}} if chat else {"text": token}
            if body.get("logprobs"):
                choice["logprobs"] = _chat_logprobs(token, top) if chat else _plain_logprobs(token, top)
            yield self._chunk(body, choice)
        usage = {"prompt_tokens": 9, "completion_tokens": len(tokens), "total_tokens": 9 + len(tokens)}
        yield json.dumps({"model": body["model"], "choices": [], "usage": usage}).encode()

    def _top(self, index: int, token: str) -> dict[str, float]:
        rivals = self.rivals.get(index, {})
        mine = rivals.get(token, self.sure)
        return {name: math.log(p) for name, p in {**rivals, token: mine, " a": 0.02, " it": 0.01}.items()}

    @staticmethod
    def _chunk(body: dict[str, Any], choice: dict[str, Any]) -> bytes:
        return json.dumps({"model": body["model"], "choices": [choice]}).encode()

    @staticmethod
    async def _refuse(send: Send, message: str) -> None:
        error = {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}
        await respond(send, 400, json.dumps(error).encode())

    def _metrics(self) -> Iterator[str]:
        yield "# TYPE vllm:generation_tokens_total counter"
        yield f'vllm:generation_tokens_total{{engine="0"}} {sum(n for *_, n in self.served)}'
        for position, name in enumerate(("time_to_first_token_seconds", "request_time_per_output_token_seconds")):
            values = [entry[position] for entry in self.served]
            yield f"# TYPE vllm:{name} histogram"
            for bound in (0.001, 0.01, 0.1, 1.0, math.inf):
                le = "+Inf" if bound == math.inf else str(bound)
                yield f'vllm:{name}_bucket{{engine="0",le="{le}"}} {sum(value <= bound for value in values)}'
            yield f'vllm:{name}_count{{engine="0"}} {len(values)}'
            yield f'vllm:{name}_sum{{engine="0"}} {sum(values)}'
        yield ""


def _chat_logprobs(token: str, top: dict[str, float]) -> dict[str, Any]:
    listed = [{"token": name, "logprob": value, "bytes": list(name.encode())} for name, value in top.items()]
    return {"content": [{"token": token, "logprob": top[token], "top_logprobs": listed}]}


def _plain_logprobs(token: str, top: dict[str, float]) -> dict[str, Any]:
    return {"tokens": [token], "token_logprobs": [top[token]], "top_logprobs": [top], "text_offset": [0]}


async def respond(send: Send, status: int, body: bytes, kind: bytes = b"application/json") -> None:
    headers: Sequence[tuple[bytes, bytes]] = [(b"content-type", kind)]
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})
