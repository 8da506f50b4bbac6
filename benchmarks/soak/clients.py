"""Mixed load: users that send good and bad requests, read slowly, disconnect early, and the outcome of each request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import time
from typing import Any, Final

from quantserve_bench.request import Request, Target
from quantserve_bench.result import error_message
from quantserve_bench.wire import ProtocolError, ResponseReader

TIMEOUT_S: Final = 120.0
QUESTION: Final = "Return a copy of the "
SHORT, LONG = 32, 300
"""Output tokens of common requests, and of those that a fault or a slow client meets in the middle."""
SLOW_BUFFER: Final = 4096
SLOW_READ: Final = 2048
SLOW_S: Final = 0.1
LARGE: Final = 1 << 20
TOO_LARGE: Final = 17 << 20
"""Bytes of a body within the default limit of 16 MiB, and of one beyond it."""
ID_HEADER: Final = b"x-request-id"


@dataclass(frozen=True)
class Kind:
    """A kind of request.

    Attributes:
        name: in tables.
        wire: head without its last line, and body.
        model: it is meant for; empty for the gateway itself or for none.
        stream: whether the response is a stream, which must end with ``[DONE]``.
        expected: status of a correct response.
        slow: read it slowly.
        leaves: disconnect when the first bytes have arrived.
        share: how often it is chosen.
    """

    name: str
    wire: tuple[bytes, bytes]
    model: str = ""
    stream: bool = False
    expected: int = 200
    slow: bool = False
    leaves: bool = False
    share: float = 1.0


@dataclass
class Outcome:
    """What became of one request; times are Unix times.

    Attributes:
        result: ``answered`` as expected; ``refused``, 429 or 503 with ``Retry-After``; ``left``, the client
            disconnected on purpose; ``failed``.
        status: 0 without a response.
        code: of the error.
        reason: why it failed.
    """

    id: str
    kind: str
    model: str
    began: float
    ended: float = 0.0
    result: str = "failed"
    status: int = 0
    code: str = ""
    reason: str = ""


@dataclass
class Book:
    """All outcomes: counts of every request, and the records of those that need an explanation.

    Attributes:
        counts: (result, kind) -> requests.
        codes: status and error code of refusals -> requests.
        answered: id -> end of its response, of the requests that the access log must have.
        sent: ids of all requests.
        unusual: outcomes that failed or were refused with 503.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    answered: dict[str, float] = field(default_factory=dict)
    sent: set[str] = field(default_factory=set)
    unusual: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome, quiet: bool) -> None:
        """Record an outcome.

        Args:
            quiet: the access log omits the request if it succeeds.
        """
        self.counts[outcome.result, outcome.kind] += 1
        if outcome.result == "refused":
            self.codes[f"{outcome.status} {outcome.code}"] += 1
        whole = outcome.result in ("answered", "refused")
        if whole and not (quiet and outcome.status < 400):
            self.answered[outcome.id] = outcome.ended
        if outcome.result == "failed" or outcome.status == 503:
            self.unusual.append(outcome)

    def total(self, result: str) -> int:
        """Requests with this result."""
        return sum(count for (got, _), count in self.counts.items() if got == result)

    def of_kind(self, kind: str, result: str) -> int:
        """Requests of this kind with this result."""
        return self.counts[result, kind]

    def to_json(self) -> dict[str, Any]:
        """Counts and records for results.json."""
        kinds = sorted({kind for _, kind in self.counts})
        results = ("answered", "refused", "left", "failed")
        return {
            "kinds": {kind: {result: self.of_kind(kind, result) for result in results} for kind in kinds},
            "codes": dict(self.codes),
            "unusual": [asdict(outcome) for outcome in self.unusual],
        }


class Users:
    """Users at work, half of them on kept-alive connections. Each kind is sent once, then by chance.

    Args:
        target: the server; its API key is sent.
        kinds: to choose from.
        book: gets every outcome.
        seed: of the choices.
    """

    def __init__(self, target: Target, kinds: Sequence[Kind], book: Book, seed: int = 0) -> None:
        self.book = book
        self.enough = asyncio.Event()
        self._target = target
        self._kinds = kinds
        self._chance = random.Random(seed)
        self._first = self._chance.sample(kinds, len(kinds))

    async def work(self, count: int, pause_s: float) -> None:
        """Run `count` users, each with pauses of `pause_s` on average, until `enough` is set."""
        async with asyncio.TaskGroup() as users:
            for number in range(count):
                users.create_task(self._user(pause_s, keeps=number % 2 == 0))

    async def burst(self, count: int) -> None:
        """Send `count` requests at once on new connections, and half a head on as many others."""
        good = [kind for kind in self._kinds if kind.model and kind.expected == 200 and not kind.slow]
        async with asyncio.TaskGroup() as tasks:
            for number in range(count):
                tasks.create_task(self._half_a_head())
                tasks.create_task(self._send(good[number % len(good)], None))

    async def _user(self, pause_s: float, keeps: bool) -> None:
        shares = [kind.share for kind in self._kinds]
        connection: _Connection | None = None
        while not self.enough.is_set():
            kind = self._first.pop() if self._first else self._chance.choices(self._kinds, shares)[0]
            connection = await self._send(kind, connection)
            if connection and not keeps:
                connection.close()
                connection = None
            await asyncio.sleep(self._chance.expovariate(1 / pause_s))
        if connection:
            connection.close()

    async def _send(self, kind: Kind, connection: _Connection | None) -> _Connection | None:
        """Send one request; returns the connection if it can be used again."""
        if kind.slow and connection:
            connection.close()
            connection = None
        kept = connection is not None
        outcome = Outcome(uuid.uuid4().hex, kind.name, kind.model, time())
        self.book.sent.add(outcome.id)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                connection = connection or await _Connection.open(self._target, kind.slow)
                await connection.exchange(kind, outcome)
        except (OSError, EOFError, ProtocolError) as error:
            outcome.reason = f"{type(error).__name__}: {error}"
        except BaseException:
            if connection:
                connection.close()
            raise
        outcome.ended = time()
        stale = kept and not outcome.status and outcome.result == "failed"
        if connection and not connection.usable:
            connection.close()
            connection = None
        if stale:  # the server may close an idle connection at the moment it is used
            return await self._send(kind, None)
        self.book.add(outcome, quiet=kind.name in ("health", "metrics"))
        return connection

    async def _half_a_head(self) -> None:
        """Begin a request, never finish it, and wait until the server gives up."""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(TIMEOUT_S):
                reader, writer = await asyncio.open_connection(self._target.host, self._target.port)
                writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n")
                await reader.read()
                writer.close()


class _Connection:
    """One connection, one exchange at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.usable = True

    @classmethod
    async def open(cls, target: Target, slow: bool) -> _Connection:
        """Connect; for a slow client with a small receive buffer."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            if slow:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER)
            await asyncio.get_running_loop().sock_connect(sock, (target.host, target.port))
            return cls(*await asyncio.open_connection(sock=sock, limit=SLOW_BUFFER if slow else 64 << 10))
        except BaseException:
            sock.close()
            raise

    def close(self) -> None:
        """Close it."""
        self.usable = False
        self._writer.transport.abort()

    async def exchange(self, kind: Kind, outcome: Outcome) -> None:
        """Send a request, read its response into `outcome`.

        Raises:
            OSError: the connection broke, or the timeout passed.
            ProtocolError: not HTTP, or it ended too early.
        """
        self.usable = False
        head, body = kind.wire
        self._writer.write(b"%s%s: %s\r\n\r\n%s" % (head, ID_HEADER, outcome.id.encode(), body))
        response = ResponseReader()
        while not response.complete:
            data = await self._reader.read(SLOW_READ if kind.slow else 64 << 10)
            if not data:
                response.end()
                break
            response.feed(data, 0)
            outcome.status = response.status
            if kind.leaves and response.body:
                outcome.result = "left"
                return
            if kind.slow:
                await asyncio.sleep(SLOW_S)
        _judge(kind, response, outcome)
        self.usable = response.keep_alive and response.complete and len(body) < TOO_LARGE


def _judge(kind: Kind, response: ResponseReader, outcome: Outcome) -> None:
    """The result of a complete response."""
    body = b"".join(part for _, part in response.body)
    outcome.status = status = response.status
    if response.headers.get("x-request-id") != outcome.id:
        outcome.reason = f"the response has the request id {response.headers.get('x-request-id')!r}"
        return
    if status >= 400:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            outcome.code = str(json.loads(body)["error"]["code"] or "")
    if status == kind.expected and (not kind.stream or status >= 400 or _whole(body)):
        outcome.result = "answered"
    elif status in (429, 503) and "retry-after" in response.headers:
        outcome.result = "refused"
    elif status == 200 and kind.stream:
        lines = [line for line in body.splitlines() if line.startswith(b"data: ")]
        outcome.reason = "the stream ended with " + (lines[-1][:200].decode(errors="replace") if lines else "nothing")
    else:
        outcome.reason = f"status {status} instead of {kind.expected}: {error_message(body)[:200]}"


def _whole(stream: bytes) -> bool:
    return stream.rstrip().endswith(b"data: [DONE]") and b'data: {"error"' not in stream


# --- kinds


def mixed(target: Target, models: Sequence[str]) -> list[Kind]:
    """Good requests for every model, wrong ones, and those for the gateway itself."""
    return [
        *(kind for model in models for kind in _good(target, model)),
        *_wrong(target, models[0]),
        Kind("models", (target.head("GET", "/v1/models"), b""), share=2),
        Kind("health", (target.head("GET", "/health"), b""), share=2),
        Kind("metrics", (target.head("GET", "/metrics"), b""), share=0.5),
    ]


def _good(target: Target, model: str) -> list[Kind]:
    def post(**fields: Any) -> tuple[bytes, bytes]:
        return _split(
            Request(ignore_eos=True, temperature=0.0, **fields).encode(Target(target.url, model, target.api_key))
        )

    chat: Mapping[str, Any] = {"messages": [{"role": "user", "content": QUESTION}]}
    return [
        Kind("chat, stream", post(**chat, max_tokens=SHORT), model, True, share=6),
        Kind("chat", post(**chat, max_tokens=SHORT, stream=False), model, share=3),
        Kind("completion, stream", post(prompt=QUESTION, max_tokens=LONG), model, True, share=3),
        Kind("completion", post(prompt=QUESTION, max_tokens=LONG, stream=False), model, share=2),
        Kind("slow reader", post(prompt=QUESTION, max_tokens=LONG), model, True, slow=True, share=1.5),
        Kind("leaves a stream", post(prompt=QUESTION, max_tokens=LONG), model, True, leaves=True, share=1.5),
    ]


def _wrong(target: Target, model: str) -> list[Kind]:
    """Requests that must be refused; they need no replica, or fail in the replica before the engine."""

    def post(
        path: str, body: bytes, key: str | None = target.api_key, kind: str = "application/json"
    ) -> tuple[bytes, bytes]:
        head = Target(target.url, "", key).head("POST", path)
        return b"%sContent-Type: %s\r\nContent-Length: %d\r\n" % (head, kind.encode(), len(body)), body

    def asked(**fields: Any) -> bytes:
        return json.dumps({"model": model, "prompt": QUESTION, "max_tokens": 8, **fields}).encode()

    path = "/v1/completions"
    return [
        Kind("unknown model", post(path, asked(model="none")), expected=404),
        Kind("unknown path", post("/v1/none", asked()), expected=404),
        Kind("no JSON", post(path, b"{"), expected=400),
        Kind("wrong type", post(path, asked(temperature="warm")), model, expected=400),
        Kind("limit in quotes", post(path, asked(n="1000")), model, expected=400),
        Kind("wrong key", post(path, asked(), key="not-a-key"), expected=401),
        Kind("not JSON's type", post(path, asked(), kind="text/plain"), expected=415),
        Kind("embeddings", post("/v1/embeddings", asked(input="a")), model, expected=404),
        Kind("large body", post(path, asked(prompt="a " * (LARGE // 2))), model, expected=400, share=0.2),
        Kind("too large body", post(path, asked(prompt="a " * (TOO_LARGE // 2))), expected=413, share=0.1),
    ]


def _split(wire: bytes) -> tuple[bytes, bytes]:
    head, _, body = wire.partition(b"\r\n\r\n")
    return head + b"\r\n", body
