"""The gateway's own metrics, and those it reads from the replicas."""

from __future__ import annotations

import asyncio
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from quantserve.serve.asgi import Guard, Refused
from quantserve.serve.gateway.metrics.collect import GatewayMetrics
from quantserve.serve.gateway.metrics.observed import Observed, expected_means
from quantserve.serve.gateway.middleware.trace import Traced, trace_of

from .asgi_client import request
from .prometheus_texts import (
    CARDS,
    EARLIER,
    LATER,
    all_samples,
    families,
    finished,
    has,
    observed,
    pool,
    value,
)


class TestRequests:
    def test_they_are_counted_by_status_and_code(self) -> None:
        text = observed(
            finished(), finished(), finished(status=400, error_code="invalid_type"), finished(model="org/big")
        )
        labels = {"path": "/v1/chat/completions"}
        assert value(text, "quantserve_requests_total", model="demo", method="awq", status="200", **labels) == 2
        assert value(text, "quantserve_requests_total", status="400", code="invalid_type", **labels) == 1
        assert value(text, "quantserve_requests_total", model="org/big", method="fp16", **labels) == 1

    def test_a_client_that_left(self) -> None:
        text = observed(finished(client_left=True), finished(status=0, client_left=True, first_byte_s=None, attempts=0))
        assert value(text, "quantserve_requests_total", status="200", code="client_left") == 1
        assert value(text, "quantserve_requests_total", status="499", code="client_left") == 1
        assert value(text, "quantserve_request_duration_seconds_count", outcome="left") == 2
        assert not has(text, "quantserve_rejected_total", reason="other")

    def test_times_go_into_histograms(self) -> None:
        text = observed(
            finished(first_byte_s=0.003, total_s=90.0, queued_s=1.5),
            finished(first_byte_s=0.0004, total_s=0.0004, status=500),
        )
        first, whole = "quantserve_time_to_first_byte_seconds", "quantserve_request_duration_seconds"
        assert value(text, f"{first}_count", stream="true") == 1, "errors say nothing about the first byte"
        assert value(text, f"{first}_bucket", le="0.0025") == 0
        assert value(text, f"{first}_bucket", le="0.005") == 1
        assert value(text, f"{whole}_bucket", outcome="ok", le="120.0") == 1
        assert value(text, f"{whole}_bucket", outcome="ok", le="60.0") == 0
        assert value(text, f"{whole}_sum", outcome="error") == 0.0004
        assert value(text, "quantserve_queue_seconds_sum", model="demo", method="awq") == 1.5

    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({"status": 429, "error_code": "queue_full"}, "queue_full"),
            ({"status": 429, "error_code": "queue_timeout", "attempts": 1}, "queue_timeout"),
            ({"status": 429, "error_code": "something_else"}, "overload"),
            ({"status": 401, "error_code": "invalid_api_key"}, "unauthorized"),
            ({"status": 413}, "too_large"),
            ({"status": 418}, "other"),
            ({"status": 200}, None),
            ({"status": 429, "attempts": 1}, None),
            ({"status": 503, "path": "/health"}, None),
        ],
    )
    def test_requests_refused_by_the_gateway(self, fields: dict[str, Any], reason: str | None) -> None:
        text = observed(finished(**{"attempts": 0, **fields}))
        found = [s for s in all_samples(text) if s.name == "quantserve_rejected_total"]
        assert {s.labels["reason"]: s.value for s in found if s.value} == ({reason: 1.0} if reason else {})
        zeros = {s.labels["reason"] for s in found if s.labels["model"] == "org/big"}
        assert zeros == {"queue_full", "queue_timeout"}, "a rate needs the zero before the first"

    def test_retries(self) -> None:
        assert value(observed(finished(attempts=3)), "quantserve_retries_total", model="demo") == 2
        assert value(observed(finished()), "quantserve_retries_total", model="demo") == 0

    @pytest.mark.parametrize(
        ("path", "label"),
        [
            ("/v1/completions", "/v1/completions"),
            ("/v1/completions/", "/v1/completions"),
            ("/demo/v1/completions", "/v1/completions"),
            ("/org--big/tokenize", "/tokenize"),
            ("/v1/models/org--big", "/v1/models"),
            ("/v1/models/org/big", "/v1/models"),
            ("/demo", "other"),
            ("/", "other"),
            ("/wp-admin/login.php", "other"),
            ("/nope/v1/completions", "other"),
        ],
    )
    def test_paths(self, path: str, label: str) -> None:
        assert has(observed(finished(path)), "quantserve_requests_total", path=label)

    def test_clients_cannot_make_labels(self) -> None:
        metrics = GatewayMetrics(CARDS)
        for number in range(1000):
            metrics(finished(f"/{number}", f"model-{number}", quant_method=f"q{number}", error_code=f"code-{number}"))
            metrics(finished(f"/v1/models/{number}", error_code="x" * 65))
            metrics(finished(error_code="a\nb"))
        found = [s for s in all_samples(metrics.render()) if s.name == "quantserve_requests_total"]
        assert {s.labels["model"] for s in found} == {"unknown", "demo"}
        assert {s.labels["method"] for s in found} == {"unknown", "awq"}
        assert {s.labels["path"] for s in found} == {"other", "/v1/models", "/v1/chat/completions"}
        assert len({s.labels["code"] for s in found}) == 65
        assert sum(s.value for s in found) == 3000

    def test_behind_the_layer_that_makes_traces(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            trace_of(scope).model = "demo"
            raise Refused(429, "busy", code="queue_full")

        metrics = GatewayMetrics(CARDS)

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            await Traced(Guard(app), [metrics])(scope, receive, send)

        asyncio.run(request(guarded, "POST", "/v1/completions", {"model": "demo"}))
        assert value(metrics.render(), "quantserve_rejected_total", model="demo", reason="queue_full") == 1

    def test_a_registry_of_its_own(self) -> None:
        first, second = GatewayMetrics(CARDS), GatewayMetrics(CARDS)
        first(finished())
        assert has(first.render(), "quantserve_requests_total")
        assert not has(second.render(), "quantserve_requests_total")
        assert b"_created" not in first.render()
        families(first.render())


class TestState:
    def test_models_replicas_and_queues(self) -> None:
        async def busy() -> bytes:
            demo, big = pool("demo", "a", "b", "c"), pool("org/big")
            demo.replicas["b"].draining = True
            metrics = GatewayMetrics(CARDS, lambda: [demo, big])
            async with demo.slot(), demo.slot():
                demo.replicas["c"].broken = True
                waiting = asyncio.create_task(demo.slot().__aenter__())
                await asyncio.sleep(0)
                text = metrics.render()
                waiting.cancel()
            return text

        text = asyncio.run(busy())
        assert value(text, "quantserve_requests_in_progress", model="demo", method="awq") == 2
        assert value(text, "quantserve_queue_length", model="demo") == 1
        assert value(text, "quantserve_queue_length", model="org/big") == 0
        states = {"ready": 1.0, "broken": 1.0, "unknown": 0.0, "draining": 1.0}
        assert {s: value(text, "quantserve_replicas", model="demo", state=s) for s in states} == states
        assert value(text, "quantserve_replicas", model="org/big", state="ready") == 0

    def test_what_is_served(self) -> None:
        text = observed()
        assert value(text, "quantserve_model_info", model="demo", method="awq", bits="4") == 1
        assert value(text, "quantserve_model_info", model="org/big", method="fp16", bits="16") == 1
        (build,) = families(text)["quantserve_build_info"].samples
        assert all(re.match(r"\d+\.\d+", text) for text in build.labels.values()), build.labels

    def test_expected_performance(self) -> None:
        text = observed()
        labels = {"model": "demo", "method": "awq", "source": "calibration"}
        assert value(text, "quantserve_expected_ttft_seconds", **labels) == 0.01
        assert value(text, "quantserve_expected_output_tokens_per_second", **labels) == 100
        # 64 tokens in 640 ms, the first after 10 ms: 63 more in 630 ms.
        assert value(text, "quantserve_expected_tpot_seconds", **labels) == pytest.approx(0.01)
        assert not has(text, "quantserve_expected_ttft_seconds", model="org/big")


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ({}, {}),
        ({"ttft_ms": None, "itl_ms": "n/a", "output_tokens_per_s": -1}, {}),
        ({"itl_ms": 20.0}, {}),
        ({"itl_ms": 20.0, "itl_definition": "time between tokens"}, {"tpot_seconds": 0.02}),
        ({"itl_ms": 20.0, "tpot_ms": 5.0, "e2e_ms": 100.0}, {"tpot_seconds": 0.005}),
        # A row of the 2023 tables: 128 tokens.
        ({"e2e_ms": 2560.0, "ttft_ms": 274.0, "itl_ms": 20.0}, {"ttft_seconds": 0.274, "tpot_seconds": 0.018}),
    ],
)  # fmt: skip
def test_expected_means(profile: dict[str, Any], expected: dict[str, float]) -> None:
    assert expected_means(profile) == pytest.approx(expected)


def counted(ttft: float, count: int) -> bytes:
    name = "vllm:time_to_first_token_seconds"
    return f'{name}_sum{{engine="0"}} {ttft}\n{name}_count{{engine="0"}} {count}\n'.encode()


def samples_by_name(text: bytes) -> dict[str, float]:
    found: dict[str, float] = {}
    for sample in all_samples(text):
        found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


class TestObserved:
    def setup_method(self) -> None:
        self.now = 0.0
        self.observed = Observed(window_s=60, clock=lambda: self.now)

    def round(self, **texts: bytes) -> None:
        for replica, text in texts.items():
            self.observed.add("m", replica, text)
        self.observed.mark([("m", replica) for replica in texts])
        self.now += 10

    def ttft(self) -> float | None:
        return self.observed.means("m").get("ttft_seconds")

    def test_real_texts(self) -> None:
        self.round(a=EARLIER)
        assert self.observed.means("m") == {}, "what was before the first scrape is not known to be recent"
        self.round(a=LATER)
        # By hand from the two files: what four requests of 32 tokens added to sums and counts.
        first, last = samples_by_name(EARLIER), samples_by_name(LATER)
        grown = {name: last[name] - first[name] for name in last}
        assert grown["vllm:request_generation_tokens_sum"] == 128
        assert grown["vllm:time_to_first_token_seconds_count"] == 4
        assert self.observed.means("m") == pytest.approx({
            "ttft_seconds": grown["vllm:time_to_first_token_seconds_sum"] / 4,
            "tpot_seconds": grown["vllm:request_time_per_output_token_seconds_sum"] / 4,
            "output_tokens_per_second": 128 / grown["vllm:e2e_request_latency_seconds_sum"],
        })  # fmt: skip

    def test_the_window_slides(self) -> None:
        self.round(a=counted(0, 0))
        self.round(a=counted(10, 10))
        assert self.ttft() == 1.0
        for _ in range(4):
            self.round(a=counted(10, 10))
        self.round(a=counted(40, 20))
        assert self.ttft() == 2.0, "both are within the minute"
        self.round(a=counted(40, 20))
        assert self.ttft() == 3.0, "the older has left it"
        for _ in range(7):
            self.round(a=counted(40, 20))
        assert self.ttft() is None

    def test_replicas_are_added_up(self) -> None:
        self.round(a=counted(0, 0), b=counted(100, 100))
        self.round(a=counted(1, 1), b=counted(109, 103))
        assert self.ttft() == 2.5

    def test_an_engine_that_started_anew_counts_from_zero(self) -> None:
        self.round(a=counted(500, 100))
        self.round(a=counted(6, 2))
        assert self.ttft() == 3.0

    def test_a_replica_that_went_and_came_is_not_counted_twice(self) -> None:
        self.round(a=counted(0, 0), b=counted(50, 10))
        self.round(a=counted(1, 1))
        self.round(a=counted(1, 1), b=counted(90, 20))
        assert self.ttft() == 1.0

    def test_frequent_scrapes_do_not_pile_up(self) -> None:
        for number in range(5000):
            self.round(a=counted(number, number))
            self.now -= 9.99
        assert len(self.observed._marks["m"]) < 150
        assert self.ttft() == pytest.approx(1.0)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_still_has_the_names_that_are_read() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    source = (Path(spec.submodule_search_locations[0]) / "v1/metrics/loggers.py").read_text()
    names = set(re.findall(r'name="(vllm:\w+)"', source))
    assert {re.sub("_(sum|count)$", "", name) for name in Observed.NAMES} <= names
