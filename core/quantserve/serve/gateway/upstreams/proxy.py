"""Proxies a request to a replica of its model: admission, retries, streaming, timeout, cancellation."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from starlette.types import Receive, Scope, Send

from quantserve.serve.asgi import JSON_KEY, Incomplete, Refused, header, internal_error, read_body
from quantserve.serve.gateway.middleware.bodies import release_body
from quantserve.serve.gateway.middleware.trace import trace_of
from quantserve.serve.gateway.upstreams.pool import Pool
from quantserve.serve.gateway.upstreams.replica_set import Replica, ReplicaDraining
from quantserve.serve.gateway.upstreams.stream_errors import error_event
from quantserve.serve.headers import DRAINING_HEADER
from quantserve.serve.transport.client import AppFailed, ReplicaLost, Response
from quantserve.serve.transport.frames import Headers
from quantserve.text import harmless

NOT_FORWARDED: Final = frozenset({b"authorization", b"x-api-key"})
"""The client's API key is not sent to replicas."""
NOT_RETURNED: Final = frozenset({b"transfer-encoding", b"connection", b"keep-alive", b"date", b"server"})
PREFIX_CHARACTERS: Final = 512
"""Length of the prompt prefix that prefix affinity hashes."""
SESSION: Final = (b"x-session-id", b"x_session_id")
"""Headers with a session id; some proxies replace the dashes."""
RETRY: Final = {"retry-after": "5"}

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
        request = _Request(scope, await read_body(receive))
        answer = _Answer(scope["path"], send)
        task = asyncio.current_task()
        assert task is not None
        ended = False
        error: Refused | None = None

        def end(reason: Refused | None) -> None:
            nonlocal ended, error
            if not ended:
                ended, error = True, reason
                task.cancel()

        def left(done: asyncio.Task[None]) -> None:
            if not done.cancelled():
                if failed := done.exception():
                    logger.warning("model %s: the client's connection failed: %r", self.pool.model_id, failed)
                end(None)

        def fail() -> None:
            end(Refused(503, "The server is shutting down. Retry in 5 s.", code="shutdown", headers=RETRY))

        leaving = asyncio.create_task(_disconnected(receive))
        leaving.add_done_callback(left)
        late = Refused(504, f"Request timed out: the model did not finish within {self.timeout_s:g} s.", code="timeout")
        timer = asyncio.get_running_loop().call_later(self.timeout_s, end, late)
        self.pool.running.add(fail)
        try:
            await self._forward(scope, request, answer)
        except asyncio.CancelledError:
            if not ended:
                raise
            task.uncancel()
        except ReplicaLost as lost:
            logger.warning("model %s: %s", self.pool.model_id, lost)
            error = internal_error(503)
        except AppFailed as failed:  # no retry: the request itself may be the cause, and would fail on every replica
            logger.warning("model %s: %s", self.pool.model_id, failed)
            error = internal_error(500)
        finally:
            self.pool.running.discard(fail)
            timer.cancel()
            leaving.cancel()
        if error is not None:
            await answer.fail(error)

    async def _forward(self, scope: Scope, request: _Request, answer: _Answer) -> None:
        """Try replicas until one responds; there is no retry once a part of the response was sent."""
        trace = trace_of(scope)
        key = self._key(scope)
        light = scope["method"] in ("GET", "HEAD")
        failed: frozenset[str] = frozenset()
        while True:
            began = time.perf_counter()
            try:
                async with (
                    self.pool.visit(failed) if light else self.pool.slot(key, failed, retry=trace.attempts > 0)
                ) as replica:
                    trace.replica = replica.id
                    trace.attempts += 1
                    trace.queued_s += time.perf_counter() - began
                    await self._exchange(replica, scope, request, answer)
                    return
            except ReplicaDraining:
                continue  # no failed attempt: it accepts no request any more, and is not asked again
            except ReplicaLost:
                failed |= {trace.replica}
                if answer.started or len(failed) >= self.attempts:
                    raise

    @staticmethod
    async def _exchange(replica: Replica, scope: Scope, request: _Request, answer: _Answer) -> None:
        """Forward the request and its response.

        Raises:
            ReplicaDraining: the replica refused it.
        """
        try:
            response = await replica.upstream.request(scope["method"], request.target, request.headers, request.body)
        except ValueError as error:
            message = "The request cannot be forwarded: its method or headers are malformed or too long."
            raise Refused(400, message, code="invalid_request") from error
        try:
            names = {name for name, _ in response.headers}
            if response.status == 503 and DRAINING_HEADER in names:
                raise ReplicaDraining
            if 300 <= response.status < 400 and b"location" in names:  # it leads to the replica, not to this gateway
                raise Refused(404, f"Unknown path {harmless(scope['path'])}.", code="unknown_url")
            request.body = b""  # there is no retry from here on
            scope.pop(JSON_KEY, None)
            release_body(scope)
            await answer.start(response.status, response.headers)
            # Each token of a stream resumes its task. In a task of its own that is 4 coroutines, here it would be 14.
            await (asyncio.create_task(answer.copy(response)) if answer.events else answer.copy(response))
        finally:
            response.close()

    def _key(self, scope: Scope) -> str | None:
        """The affinity key of this request; None without affinity."""
        affinity = self.pool.limits.affinity
        if affinity == "none" or len(self.pool.replicas) < 2:
            return None
        for name in SESSION:
            if session := header(scope, name):
                return session.decode("latin-1")[:256]
        fields = scope.get(JSON_KEY)
        return affinity_key(fields, affinity) if isinstance(fields, Mapping) else None


class _Request:
    """What is sent to a replica. The body is dropped as soon as no retry can need it: requests last minutes."""

    def __init__(self, scope: Scope, body: bytes) -> None:
        self.target = _target(scope)
        self.headers = [(key, value) for key, value in scope["headers"] if key not in NOT_FORWARDED]
        self.body = body


class _Answer:
    """The response to the client, and how much of it was sent.

    Attributes:
        started: whether status and headers were sent.
        complete: whether all of it was sent.
        events: whether it is a stream of events.
    """

    def __init__(self, path: str, send: Send) -> None:
        self._path = path
        self._send = send
        self._last = b""
        self.started = False
        self.complete = False
        self.events = False

    async def start(self, status: int, headers: Headers) -> None:
        self.started = True
        kept = [(name, value) for name, value in headers if name not in NOT_RETURNED]
        self.events = any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in kept)
        await self._send({"type": "http.response.start", "status": status, "headers": kept})

    async def copy(self, response: Response) -> None:
        """Send the body of a replica's response."""
        while data := await response.read():
            self._last = data
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
        await self.end()

    async def end(self, data: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": False})
        self.complete = True

    async def fail(self, refused: Refused) -> None:
        """Report an error to the client: as a response, as an event of a stream, or by closing the connection.

        Raises:
            Refused: nothing was sent yet, so the error becomes the response.
            Incomplete: a part of a response other than a stream was sent.
        """
        if self.complete:  # the timeout or the shutdown came a moment after its end
            return
        if not self.started:
            raise refused
        if not self.events:
            raise Incomplete(f"the response ended early: {refused}")
        await self.end(error_event(self._path, refused.error, self._last))


def affinity_key(fields: Mapping[str, Any], affinity: str) -> str | None:
    """The session id in the request, or with prefix affinity a hash of the beginning of its prompt."""
    for name in ("prompt_cache_key", "user"):
        if isinstance(value := fields.get(name), str) and value:
            return f"{name}:{value[:256]}"
    if affinity != "prefix":
        return None
    text = _first_text(fields.get("messages") or fields.get("prompt"))
    if not text:
        return None
    return hashlib.blake2b(text[:PREFIX_CHARACTERS].encode("utf-8", "replace"), digest_size=16).hexdigest()


def _first_text(value: object) -> str | None:
    """The first text of a prompt, of a list of messages or of a message with parts."""
    while not isinstance(value, str):
        if isinstance(value, list) and value:
            value = value[0]
        elif isinstance(value, Mapping):
            value = value.get("content", value.get("text"))
        else:
            return None
    return value


def _target(scope: Scope) -> bytes:
    """Encoded path and query."""
    path = quote(scope["path"], safe="/:@!$&'()*+,;=~").encode()
    query: bytes = scope.get("query_string", b"")
    return path + (b"?" + query if query else b"")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
