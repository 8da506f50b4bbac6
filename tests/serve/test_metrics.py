"""Metrics of the front door, merged with the replicas'."""

from __future__ import annotations

import asyncio
import gzip
import importlib.util
import math
import re
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import ASGIApp, Receive, Scope, Send

from quantserve.serve.asgi import Guard, Refused
from quantserve.serve.listener import Listener
from quantserve.serve.metrics import GatewayMetrics, MetricsEndpoint, Observed, expected_means
from quantserve.serve.metrics_text import CONTENT_TYPE, merge, totals
from quantserve.serve.replicas import Limits, Pool, Replica
from quantserve.serve.trace import Trace, Traced, trace_of

from .asgi_client import Answer, request

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


class TestMerge:
    LABELS = {"model": "demo", "method": "awq", "replica": "r1"}

    def test_a_real_text_keeps_every_value_and_gains_labels(self) -> None:
        before, merged = all_samples(EARLIER), merge(b"", [(self.LABELS, EARLIER)])
        after = samples(merged)
        assert len(before) == len(after) > 250
        for sample in before:
            renamed = {("exported_method" if key == "method" else key): text for key, text in sample.labels.items()}
            key = (sample.name, frozenset({**renamed, **self.LABELS}.items()))
            assert after[key] == sample.value or math.isnan(sample.value)

    def test_families_stay_in_one_piece_with_their_types(self) -> None:
        texts = [({**self.LABELS, "replica": name}, text) for name, text in (("r1", EARLIER), ("r2", LATER))]
        merged = merge(b"# HELP own Ours.\n# TYPE own gauge\nown 1\n", texts)
        found, real = families(merged), families(EARLIER)
        assert list(found) == ["own", *real]
        for name, family in real.items():
            assert (found[name].type, found[name].documentation) == (family.type, family.documentation)
            assert len(found[name].samples) == 2 * len(family.samples)

    def test_processes_are_told_apart(self) -> None:
        own = b"# TYPE process_open_fds gauge\nprocess_open_fds 7\n"
        merged = merge(own, [({"replica": name}, EARLIER) for name in "ab"])
        assert [s.labels for s in families(merged)["process_open_fds"].samples] == [
            {}, {"replica": "a"}, {"replica": "b"}
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("line", "name", "labels", "number", "time_s"),
        [
            ("plain 1", "plain", {}, 1, None),
            ("plain\t2.5 1700000000000", "plain", {}, 2.5, 1_700_000_000),
            ("empty{} NaN", "empty", {}, math.nan, None),
            ('one{a="x"} +Inf', "one", {"a": "x"}, math.inf, None),
            ('spaced {a="x" , b="y", } 3 1700000000000', "spaced", {"a": "x", "b": "y"}, 3, 1_700_000_000),
            (r'tricky{a="q\"} # {\\",b="n\nl"} 4', "tricky", {"a": 'q"} # {\\', "b": "n\nl"}, 4, None),
            (r'clash{model="x\\",a="model=\"y\""} 5', "clash", {"exported_model": "x\\", "a": 'model="y"'}, 5, None),
            ('twice{exported_model="a",model="b"} 6', "twice",
             {"exported_model": "a", "exported_exported_model": "b"}, 6, None),
            ('submodel{mymodel="x"} 7', "submodel", {"mymodel": "x"}, 7, None),
            ('hit{le="1"} 8 # {trace_id="a"} 0.5 1700000000.0', "hit", {"le": "1"}, 8, None),
            ('bare 9 # {trace_id="a"} 0.5', "bare", {}, 9, None),
            ('timed{le="1"} 8 1700000000000 # {trace_id="}"} 0.5', "timed", {"le": "1"}, 8, 1_700_000_000),
        ],
    )  # fmt: skip
    def test_lines(self, line: str, name: str, labels: dict[str, str], number: float, time_s: float | None) -> None:
        added = {"model": 'a"b\\c\nd', "replica": "r"}
        merged = merge(b"", [(added, f"{line}\n".encode())])
        (sample,) = all_samples(merged)
        assert (sample.name, sample.labels, sample.timestamp) == (name, {**labels, **added}, time_s)
        assert sample.value == number or (math.isnan(number) and math.isnan(sample.value))
        assert b" # " not in merged.replace(rb"\"} # {", b""), "an exemplar was left"

    def test_what_is_broken_is_left_out_alone(self) -> None:
        comments = b"<html>\n# EOF\n# just a comment\n\n"
        lines = b'open{a="x 1\nno{a="x"} number\nno{a="x"}\nno\n{} 2\n9lives 3\ngood 4\ngood{a="cut o'
        assert samples(merge(b"", [({"model": "m"}, comments + lines)])) == {("good", frozenset({("model", "m")})): 4.0}

    def test_a_family_that_changed_its_type_does_not_spoil_the_text(self) -> None:
        old = b"# TYPE x gauge\nx 1\n"
        new = b'# HELP x New.\n# TYPE x histogram\nx_bucket{le="+Inf"} 2\nx_sum 2\nx_count 2\n# TYPE y gauge\ny 3\n'
        merged = merge(b"", [({"replica": "a"}, old), ({"replica": "b"}, new)])
        assert set(samples(merged)) == {("x", frozenset({("replica", "a")})), ("y", frozenset({("replica", "b")}))}

    def test_samples_that_do_not_follow_their_declaration_find_it(self) -> None:
        text = b'# TYPE h histogram\n# TYPE g gauge\ng 1\nh_bucket{le="+Inf"} 2\nh_sum 2\nh_count 2\n'
        found = families(merge(b"", [({"replica": "a"}, text)]))
        assert (len(found["h"].samples), found["h"].type, len(found["g"].samples)) == (3, "histogram", 1)

    def test_it_is_fast(self) -> None:
        text = EARLIER * 3  # about the size of a replica with more models' worth of series
        began = time.process_time()
        for _ in range(5):
            merge(b"", [({**self.LABELS, "replica": str(number)}, text) for number in range(4)])
        per_megabyte = (time.process_time() - began) / (20 * len(text) / 1e6)
        assert per_megabyte < 0.25, f"{per_megabyte * 1000:.0f} ms per MB"

    def test_totals(self) -> None:
        text = b'a_sum 1\na_sum{x="} 9"} 2 1700000000000\na_sum_more 50\nb_a_sum 60\n# a_sum 70\na_sum{y="z"} 4'
        assert totals(text, ["a_sum", "gone"]) == {"a_sum": 7.0}


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
    def test_what_the_front_door_refused(self, fields: dict[str, Any], reason: str | None) -> None:
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
                demo.replicas["c"].broken_until = time.monotonic() + 60
                waiting = asyncio.create_task(demo.slot().__aenter__())
                await asyncio.sleep(0)
                text = metrics.render()
                waiting.cancel()
            return text

        text = asyncio.run(busy())
        assert value(text, "quantserve_requests_in_progress", model="demo", method="awq") == 2
        assert value(text, "quantserve_queue_length", model="demo") == 1
        assert value(text, "quantserve_queue_length", model="org/big") == 0
        states = {"ready": 1.0, "broken": 1.0, "draining": 1.0}
        assert {s: value(text, "quantserve_replicas", model="demo", state=s) for s in states} == states
        assert value(text, "quantserve_replicas", model="org/big", state="ready") == 0

    def test_what_is_served(self) -> None:
        text = observed()
        assert value(text, "quantserve_model_info", model="demo", method="awq", bits="4") == 1
        assert value(text, "quantserve_model_info", model="org/big", method="fp16", bits="16") == 1
        (build,) = families(text)["quantserve_build_info"].samples
        assert all(re.match(r"\d+\.\d+", text) for text in build.labels.values()), build.labels

    def test_what_was_expected(self) -> None:
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


def samples_by_name(text: bytes) -> dict[str, float]:
    found: dict[str, float] = {}
    for sample in all_samples(text):
        found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


class TestEndpoint:
    def ask(
        self,
        texts: Mapping[str, bytes | Exception | float],
        *,
        rounds: int = 1,
        method: str = "GET",
        accept: str = "identity",
    ) -> tuple[Answer, float]:
        """Scrape; a replica's text may be an error or the seconds it hangs. Returns the last answer and its time."""
        pools = [
            pool("demo", *(name for name in texts if name < "x")),
            pool("org/big", *(n for n in texts if n >= "x")),
        ]
        metrics = GatewayMetrics(CARDS, lambda: pools)

        async def fetch(replica: Replica) -> bytes:
            text = texts[replica.id]
            if isinstance(text, Exception):
                raise text
            if isinstance(text, float):
                await asyncio.sleep(text)
                return EARLIER
            return text

        async def scrape() -> tuple[Answer, float]:
            endpoint = MetricsEndpoint(metrics, fetch, timeout_s=0.2)
            for _ in range(rounds):
                began = time.perf_counter()
                answer = await request(endpoint, method, "/metrics", headers={"accept-encoding": accept})
            return answer, time.perf_counter() - began

        return asyncio.run(scrape())

    def test_everything_in_one_text(self) -> None:
        answer, _ = self.ask({"a": EARLIER, "b": LATER, "x": EARLIER})
        assert (answer.status, answer.headers["content-type"]) == (200, CONTENT_TYPE)
        families(answer.body)
        tokens = "vllm:generation_tokens_total"
        assert value(answer.body, tokens, model="demo", method="awq", replica="a", model_name="demo") == 75
        assert value(answer.body, tokens, model="demo", method="awq", replica="b") == 203
        assert value(answer.body, tokens, model="org/big", method="fp16", replica="x") == 75
        assert value(answer.body, "quantserve_scrape_errors_total", model="demo") == 0
        assert value(answer.body, "quantserve_replicas", model="demo", state="ready") == 2
        assert len({s.labels.get("replica") for s in all_samples(answer.body) if s.name == "process_open_fds"}) == 4

    def test_a_replica_that_hangs_or_fails_is_left_out_and_counted(self) -> None:
        answer, seconds = self.ask({"a": 30.0, "b": OSError("gone"), "c": LATER}, rounds=3)
        assert seconds < 1
        assert {s.labels["replica"] for s in all_samples(answer.body) if s.name.startswith("vllm:")} == {"c"}
        assert value(answer.body, "quantserve_scrape_errors_total", model="demo", method="awq") == 6
        assert value(answer.body, "quantserve_scrape_errors_total", model="org/big") == 0

    def test_replicas_are_asked_at_once(self) -> None:
        _, seconds = self.ask(dict.fromkeys("abcdef", 0.1))
        assert seconds < 0.4

    def test_observed_appears_beside_expected(self) -> None:
        pools = [pool("demo", "a")]
        texts = [EARLIER, LATER]

        async def fetch(replica: Replica) -> bytes:
            return texts.pop(0)

        async def scrape() -> bytes:
            endpoint = MetricsEndpoint(GatewayMetrics(CARDS, lambda: pools), fetch)
            await endpoint.text()
            return await endpoint.text()

        text = asyncio.run(scrape())
        for name in ("ttft_seconds", "tpot_seconds", "output_tokens_per_second"):
            assert value(text, f"quantserve_expected_{name}", model="demo", method="awq") > 0
            assert value(text, f"quantserve_observed_{name}", model="demo", method="awq") > 0

    def test_scrapes_at_the_same_time_share_a_round(self) -> None:
        pools, asked = [pool("demo", "a")], []

        async def fetch(replica: Replica) -> bytes:
            asked.append(replica.id)
            await asyncio.sleep(0.05)
            return EARLIER

        async def scrape() -> list[Answer]:
            endpoint = MetricsEndpoint(GatewayMetrics(CARDS, lambda: pools), fetch)
            return await asyncio.gather(*(request(endpoint, "GET", "/metrics") for _ in range(20)))

        answers = asyncio.run(scrape())
        assert asked == ["a"]
        assert len({answer.body for answer in answers}) == 1

    def test_gzip(self) -> None:
        plain, _ = self.ask({"a": EARLIER})
        packed, _ = self.ask({"a": EARLIER}, accept="gzip")
        assert packed.headers["content-encoding"] == "gzip"
        assert len(packed.body) < len(plain.body) / 4
        assert has(gzip.decompress(packed.body), "vllm:generation_tokens_total")

    def test_head_and_other_methods(self) -> None:
        assert self.ask({}, method="HEAD")[0].status == 200
        refused, _ = self.ask({}, method="POST")
        assert (refused.status, refused.headers["allow"]) == (405, "GET")

    def test_over_a_connection(self) -> None:
        """Over the wire that the front door and replicas talk on."""

        async def scrape() -> bytes:
            seen: list[tuple[str, str]] = []

            def answer(status: int, text: bytes) -> ASGIApp:
                async def app(scope: Scope, receive: Receive, send: Send) -> None:
                    seen.append((scope["method"], scope["path"]))
                    await send({"type": "http.response.start", "status": status, "headers": []})
                    await send({"type": "http.response.body", "body": text})

                return app

            ports, listeners = [1], []
            for app in (answer(200, EARLIER), answer(500, b"bad 1\n")):
                listening = socket.create_server(("127.0.0.1", 0))
                listeners.append(Listener(app, "secret"))
                await listeners[-1].start(listening)
                ports.append(listening.getsockname()[1])
            made = Pool("demo", Limits(), token="secret")
            made.update([{"id": f"r{n}", "host": "127.0.0.1", "port": port} for n, port in enumerate(ports)])
            text = await MetricsEndpoint(GatewayMetrics(CARDS, lambda: [made])).text()
            assert seen == [("GET", "/metrics")] * 2
            made.update([])
            for listener in listeners:
                listener.close()
            return text

        text = asyncio.run(scrape())
        assert value(text, "vllm:generation_tokens_total", replica="r1") == 75
        assert value(text, "quantserve_scrape_errors_total", model="demo") == 2
        assert not has(text, "bad")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_still_has_the_names_that_are_read() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations
    source = (Path(spec.submodule_search_locations[0]) / "v1/metrics/loggers.py").read_text()
    names = set(re.findall(r'name="(vllm:\w+)"', source))
    assert {re.sub("_(sum|count)$", "", name) for name in Observed.NAMES} <= names
