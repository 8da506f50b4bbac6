"""Proxies a request to a replica of its model: admission, retries, streaming, timeout, cancellation."""

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
from quantserve.serve.upstream import AppFailed, ReplicaLost, Response
from quantserve.serve.wire import Headers

DRAINING: Final = b"x-quantserve-draining"
"""Header of the refusal of a draining replica; the request is retried on another one."""
NOT_FORWARDED: Final = frozenset({b"authorization"})
"""The client's API key is not sent to replicas."""
NOT_RETURNED: Final = frozenset({b"transfer-encoding", b"connection", b"keep-alive", b"date", b"server"})
PREFIX_CHARACTERS: Final = 512
"""Length of the prompt prefix that prefix affinity hashes."""
SESSION: Final = b"x-session-id"

logger = logging.getLogger(__name__)


class RemoteModel:
    """ASGI app that forwards requests to the replicas of a model.

    Args:
        pool: the model's replicas.
        timeout_s: request timeout, from the request to the end of the response.
        attempts: most replicas a request is tried on.
    """

    def __init__(self, pool: Pool, timeout_s: float = 600.0, attempts: int = 3) -> None:
        self.pool = pool
        self.timeout_s = timeout_s
        self.attempts = attempts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward one HTTP request. A disconnected client or the timeout cancels it in the replica.

        Raises:
            Refused: the queue is full, there is no replica, or the request timed out.
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
                message = f"Request timed out: the model did not finish within {self.timeout_s:g} s."
                await answer.fail(Refused(504, message, code="timeout"))
        except ReplicaLost as lost:
            logger.warning("model %s: %s", self.pool.model_id, lost)
            await answer.fail(internal_error(503))
        except AppFailed as failed:  # no retry: the request itself may be the cause, and would fail on every replica
            logger.warning("model %s: %s", self.pool.model_id, failed)
            await answer.fail(internal_error(500))
        finally:
            timer.cancel()
            leaving.cancel()

    async def _forward(self, scope: Scope, body: bytes, answer: _Answer) -> None:
        """Try replicas until one responds; there is no retry once a part of the response was sent."""
        trace = trace_of(scope)
        target = _target(scope)
        headers = [(key, value) for key, value in scope["headers"] if key not in NOT_FORWARDED]
        key = self._key(scope, body)
        light = scope["method"] in ("GET", "HEAD")
        failed: set[str] = set()
        began = time.perf_counter()
        for attempt in range(1, self.attempts + 1):
            avoid = frozenset(failed)
            async with self.pool.visit(avoid) if light else self.pool.slot(key, avoid) as replica:
                trace.replica, trace.attempts = replica.id, attempt
                trace.queued_s += time.perf_counter() - began
                try:
                    if await self._exchange(replica, scope["method"], target, headers, body, answer):
                        return
                except ReplicaLost:
                    replica.broken_until = time.monotonic() + BROKEN_S
                    if answer.started or attempt == self.attempts:
                        raise
                failed.add(replica.id)
                began = time.perf_counter()
        raise self.pool.unavailable()

    @staticmethod
    async def _exchange(
        replica: Replica, method: str, target: bytes, headers: Headers, body: bytes, answer: _Answer
    ) -> bool:
        """Forward the request and its response; False when the replica is draining and refused it."""
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
        """The affinity key of this request; None without affinity."""
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
    """The response to the client, and how much of it was sent."""

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
        """Report an error to the client: as a response, as an event of a stream, or by closing the connection.

        Raises:
            Refused: nothing was sent yet, so the error becomes the response.
            ReplicaLost: a part of a response other than a stream was sent; the connection must be closed.
        """
        if not self.started:
            raise refused
        if not self._events:
            raise ReplicaLost("the response ended early")
        await self.end(b"data: " + bytes(refused.response.body) + b"\n\n")


def affinity_key(fields: Mapping[str, Any], affinity: str) -> str | None:
    """The session id in the request, or with prefix affinity a hash of the beginning of its prompt."""
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
    """Encoded path and query."""
    path = quote(scope["path"], safe="/:@!$&'()*+,;=~").encode()
    query: bytes = scope.get("query_string", b"")
    return path + (b"?" + query if query else b"")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
