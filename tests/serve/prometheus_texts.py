"""Prometheus texts: real ones of vLLM, and how tests read and make them."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from quantserve.serve.gateway.metrics.collect import GatewayMetrics
from quantserve.serve.gateway.middleware.trace import Trace
from quantserve.serve.gateway.upstreams.pool import Limits, Pool, Replica

DATA = Path(__file__).parent / "data"
EARLIER = (DATA / "vllm-0.32-metrics.txt").read_bytes()
LATER = (DATA / "vllm-0.32-metrics-later.txt").read_bytes()
"""Real texts of one server, four requests apart."""
EXPECTED = {"source": "calibration", "e2e_ms": 640.0, "ttft_ms": 10.0, "itl_ms": 10.0, "output_tokens_per_s": 100.0}
CARDS = [
    {"id": "demo", "metadata": {"method": "awq", "bits": 4, "route": "/demo", "expected_performance": EXPECTED}},
    {"id": "org/big", "metadata": {"method": "fp16", "bits": 16, "route": "/org--big", "expected_performance": None}},
]

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
Fetch = Callable[[Replica], Awaitable[bytes]]


def families(text: bytes) -> dict[str, Metric]:
    """The text read back, which must hold every family and every sample once, as Prometheus demands."""
    assert text.endswith(b"\n")
    found: dict[str, Metric] = {}
    for family in text_string_to_metric_families(text.decode()):
        assert family.name not in found or family.type == "untyped", f"{family.name} is not in one piece"
        found.setdefault(family.name, family)
    keys = [(s.name, frozenset(s.labels.items())) for s in all_samples(text)]
    assert len(keys) == len(set(keys))
    declared = re.findall(rb"^# (TYPE|HELP) (\S+)", text, re.MULTILINE)
    assert len(declared) == len(set(declared))
    return found


def all_samples(text: bytes) -> list[Any]:
    return [sample for family in text_string_to_metric_families(text.decode()) for sample in family.samples]


def samples(text: bytes) -> Samples:
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in all_samples(text)}


def value(text: bytes, name: str, **labels: str) -> float:
    """The one sample with these labels among its own."""
    found = [s.value for s in all_samples(text) if s.name == name and labels.items() <= s.labels.items()]
    assert len(found) == 1, f"{len(found)} samples of {name} {labels}"
    return float(found[0])


def has(text: bytes, name: str, **labels: str) -> bool:
    return any(s.name == name and labels.items() <= s.labels.items() for s in all_samples(text))


def pool(model: str, *names: str) -> Pool:
    made = Pool(model, Limits(ongoing=1, queued=4))
    made.update([{"id": name, "host": "127.0.0.1", "port": 9} for name in names])
    return made


def observed(*traces: Trace) -> bytes:
    metrics = GatewayMetrics(CARDS)
    for trace in traces:
        metrics(trace)
    return metrics.render()


def finished(path: str = "/v1/chat/completions", model: str = "demo", **fields: Any) -> Trace:
    known: dict[str, Any] = {"status": 200, "attempts": 1, "first_byte_s": 0.02, "total_s": 0.3, "stream": True}
    return Trace("id", "POST", path, 0.0, model=model, **{**known, **fields})
