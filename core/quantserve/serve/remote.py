"""A model whose replicas answer from other processes: one request, from admission to its last byte."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from starlette.types import Receive, Scope, Send

from quantserve.serve.asgi import Refused, header, internal_error, read_body
from quantserve.serve.limits import JSON_KEY
from quantserve.serve.replicas import BROKEN_S, Pool, Replica
from quantserve.serve.trace import trace_of
from quantserve.serve.upstream import ReplicaLost, Response
from quantserve.serve.wire import Headers

ATTEMPTS: Final = 3
DRAINING: Final = b"x-quantserve-draining"
"""Header of a replica's refusal while it is being stopped; the request goes to another one."""
NOT_FORWARDED: Final = frozenset({b"authorization"})
"""The client's key ends at the front door."""
NOT_RETURNED: Final = frozenset({b"transfer-encoding", b"connection", b"keep-alive", b"date", b"server"})
PREFIX_CHARACTERS: Final = 512
"""How much of a prompt's beginning decides where it goes, with prefix affinity."""
SESSION: Final = b"x-session-id"

logger = logging.getLogger(__name__)


class RemoteModel:
    """ASGI app that answers from a replica of a model.

    Args:
        pool: the model's replicas.
        timeout_s: longest time from the request to the end of the answer.
    """

    def __init__(self, pool: Pool, timeout_s: float = 600.0) -> None:
        self.pool = pool
        self.timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward one HTTP request. A client that leaves, or time that is up, cancels it in the replica.

        Raises:
            Refused: the model has no place, no replica, or did not answer in time.
        """
        body = await read_body(receive)
        answer = _Answer(send)
        task = asyncio.current_task()
        assert task is not None
        ended = ""

        def end(reason: str) -> None:
            nonlocal ended
            if not ended:
                ended = reason
                task.cancel()

        leaving = asyncio.create_task(_disconnected(receive))
        leaving.add_done_callback(lambda done: None if done.cancelled() else end("left"))
        timer = asyncio.get_running_loop().call_later(self.timeout_s, end, "late")
        try:
            await self._forward(scope, body, answer)
        except asyncio.CancelledError:
            if not ended:
                raise
            task.uncancel()
            if ended == "late":
                message = f"the model did not finish within {self.timeout_s:g} s"
                await answer.fail(Refused(504, message, code="timeout"))
        except ReplicaLost as lost:
            logger.warning("model %s: %s", self.pool.model_id, lost)
            await answer.fail(internal_error(503))
        finally:
            timer.cancel()
            leaving.cancel()

    async def _forward(self, scope: Scope, body: bytes, answer: _Answer) -> None:
        """Try replicas until one answers; once something was sent there is no other attempt."""
        trace = trace_of(scope)
        target = _target(scope)
        headers = [(key, value) for key, value in scope["headers"] if key not in NOT_FORWARDED]
        key = self._key(scope, body)
        light = scope["method"] in ("GET", "HEAD")
        failed: set[str] = set()
        began = time.perf_counter()
        for attempt in range(1, ATTEMPTS + 1):
            avoid = frozenset(failed)
            async with self.pool.visit(avoid) if light else self.pool.slot(key, avoid) as replica:
                trace.replica, trace.attempts = replica.id, attempt
                trace.queued_s += time.perf_counter() - began
                try:
                    if await self._exchange(replica, scope["method"], target, headers, body, answer):
                        return
                except ReplicaLost:
                    replica.broken_until = time.monotonic() + BROKEN_S
                    if answer.started or attempt == ATTEMPTS:
                        raise
                failed.add(replica.id)
                began = time.perf_counter()
        raise self.pool.unavailable()

    @staticmethod
    async def _exchange(
        replica: Replica, method: str, target: bytes, headers: Headers, body: bytes, answer: _Answer
    ) -> bool:
        """Pass the request on and the answer back; False when the replica is being stopped and took it not."""
        response: Response = await replica.upstream.request(method, target, headers, body)
        try:
            if response.status == 503 and any(name == DRAINING for name, _ in response.headers):
                replica.draining = True
                return False
            await answer.start(response.status, response.headers)
            while data := await response.read():
                await answer.send(data)
            await answer.end()
        finally:
            response.close()
        return True

    def _key(self, scope: Scope, body: bytes) -> str | None:
        """What keeps this request together with others on one replica."""
        affinity = self.pool.limits.affinity
        if affinity == "none" or len(self.pool.replicas) < 2:
            return None
        if session := header(scope, SESSION):
            return session.decode("latin-1")[:256]
        fields = scope.get(JSON_KEY)
        if fields is None:
            try:
                fields = json.loads(body)
            except ValueError:
                return None
        return affinity_key(fields, affinity) if isinstance(fields, Mapping) else None


class _Answer:
    """What the client has been sent so far."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self._events = False

    async def start(self, status: int, headers: Headers) -> None:
        self.started = True
        kept = [(name, value) for name, value in headers if name not in NOT_RETURNED]
        self._events = any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in kept)
        await self._send({"type": "http.response.start", "status": status, "headers": kept})

    async def send(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def fail(self, refused: Refused) -> None:
        """Tell the client what went wrong, in the way that is left.

        Raises:
            Refused: nothing was sent yet, so that it can be a whole answer.
            ReplicaLost: half an answer was sent which cannot take an error; the connection must break.
        """
        if not self.started:
            raise refused
        if not self._events:
            raise ReplicaLost("the answer was cut short")
        await self.end(b"data: " + bytes(refused.response.body) + b"\n\n")


def affinity_key(fields: Mapping[str, Any], affinity: str) -> str | None:
    """The session a request names, or the beginning of its prompt."""
    for name in ("prompt_cache_key", "user"):
        if isinstance(value := fields.get(name), str) and value:
            return f"{name}:{value[:256]}"
    if affinity != "prefix":
        return None
    messages, prompt = fields.get("messages"), fields.get("prompt")
    text = json.dumps(messages[0]) if isinstance(messages, list) and messages else prompt
    if not isinstance(text, str):
        return None
    return hashlib.blake2b(text[:PREFIX_CHARACTERS].encode("utf-8", "replace"), digest_size=16).hexdigest()


def _target(scope: Scope) -> bytes:
    """Path and query as they go on the wire."""
    path = quote(scope["path"], safe="/:@!$&'()*+,;=~").encode()
    query: bytes = scope.get("query_string", b"")
    return path + (b"?" + query if query else b"")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
