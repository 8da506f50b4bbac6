"""Clients that ask one question after the other, from a thread of their own, and what became of each."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from .server import HANGS_S, Server

ASK = {"prompt": "Return a copy of the", "max_tokens": 32, "temperature": 0, "ignore_eos": True}


@dataclass(frozen=True)
class Asked:
    """A kind of client: its model, whether it streams, further fields of its body, and its headers."""

    model: str
    stream: bool = False
    fields: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What became of one request; times are `time.monotonic`.

    Attributes:
        kind: ``ok``; ``refused``, a whole answer with status 400 and above; ``event``, a stream that ended with an
            error event; ``cut``, an answer that broke off; ``lost``, no answer at all.
        first_s: from the beginning to the first bytes of the body.
    """

    asked: Asked
    began: float
    ended: float = 0.0
    kind: str = "lost"
    status: int = 0
    first_s: float = 0.0
    headers: httpx.Headers = field(default_factory=httpx.Headers)
    body: str = ""
    reason: str = ""

    @property
    def took(self) -> float:
        return self.ended - self.began

    @property
    def error(self) -> dict[str, Any]:
        """The error of a refusal or of the stream's last event, which must be in OpenAI's envelope."""
        lines = [line.removeprefix("data: ") for line in self.body.splitlines() if '"error"' in line]
        found = json.loads(self.body if self.kind == "refused" else lines[-1])
        assert set(found["error"]) == {"message", "type", "param", "code"}, self
        return dict(found["error"])


class Clients:
    """Clients at work while the block runs, each on a new connection for every request.

    Args:
        server: whom they ask.
        kinds: one client each.
        pause_s: how long a client rests after a refusal.

    Attributes:
        outcomes: of the requests that have ended.
        running: of those in progress.
    """

    def __init__(self, server: Server, kinds: Sequence[Asked], pause_s: float = 0.25) -> None:
        self.outcomes: list[Outcome] = []
        self.running: list[Outcome] = []
        self._server = server
        self._kinds = kinds
        self._pause_s = pause_s
        self._enough = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Clients:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let every client finish its request."""
        self._enough.set()
        self._thread.join(HANGS_S)
        assert not self._thread.is_alive(), "a request hangs"

    def of(self, model: str, since: float = 0.0) -> list[Outcome]:
        """Outcomes of requests to a model that began after `since`."""
        return [outcome for outcome in list(self.outcomes) if outcome.asked.model == model and outcome.began >= since]

    def wait(self, check: Callable[[], bool], seconds: float = HANGS_S) -> None:
        """Wait until `check` holds."""
        deadline = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < deadline, f"not within {seconds} s; the last: {self.outcomes[-4:]}"
            time.sleep(0.1)

    def streaming(self, model: str) -> bool:
        """Whether a stream of a model is in progress, of which a part has arrived."""
        return any(one.asked.model == model and one.asked.stream and one.first_s for one in list(self.running))

    def served(self, model: str, since: float, count: int = 3) -> Callable[[], bool]:
        """Whether so many requests to a model that began after `since` were answered."""
        return lambda: sum(outcome.kind == "ok" for outcome in self.of(model, since)) >= count

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(limits=limits, timeout=100, trust_env=False) as client:
            await asyncio.gather(*(self._one(client, asked) for asked in self._kinds))

    async def _one(self, client: httpx.AsyncClient, asked: Asked) -> None:
        while not self._enough.is_set():
            outcome = Outcome(asked, time.monotonic())
            self.running.append(outcome)
            try:
                await self._ask(client, outcome)
            except httpx.HTTPError as error:
                outcome.kind = "cut" if outcome.status else "lost"
                outcome.reason = repr(error)
            outcome.ended = time.monotonic()
            self.running.remove(outcome)
            self.outcomes.append(outcome)
            if outcome.kind != "ok":
                await asyncio.sleep(self._pause_s)

    async def _ask(self, client: httpx.AsyncClient, outcome: Outcome) -> None:
        asked = outcome.asked
        body = {"model": asked.model, **ASK, "stream": asked.stream, **asked.fields}
        headers = {"authorization": f"Bearer {self._server.key}"} if self._server.key else {}
        url = f"{self._server.base}/v1/completions"
        async with client.stream("POST", url, json=body, headers={**headers, **asked.headers}) as response:
            outcome.status, outcome.headers = response.status_code, response.headers
            async for text in response.aiter_text():
                outcome.first_s = outcome.first_s or time.monotonic() - outcome.began
                outcome.body += text
        if outcome.status >= 400:
            outcome.kind = "refused"
        elif not asked.stream:
            outcome.kind = "ok" if "choices" in json.loads(outcome.body) else "cut"
        elif 'data: {"error"' in outcome.body:
            outcome.kind = "event"
        else:
            outcome.kind = "ok" if outcome.body.rstrip().endswith("data: [DONE]") else "cut"
