"""The page's pure modules, run in a browser."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from helpers.browser import watched_page

from .gateway import Served

METRICS = Path(__file__).parents[1] / "serve" / "data" / "vllm-0.32-metrics.txt"
STREAM = (
    "\ufeff: comment\r\ndata: {\"a\": 1}\r\n\r\nevent: error\rdata: two\rdata:lines\r\rid: 7\n\ndata\n\n"
    "data: \u00e9\u2713\nretry: 5\nother: x\n\ndata: never ended"
)  # fmt: skip
EVENTS = [
    {"event": "message", "data": '{"a": 1}'},
    {"event": "error", "data": "two\nlines"},
    {"event": "message", "data": ""},
    {"event": "message", "data": "\u00e9\u2713"},
]


@pytest.fixture(scope="module")
def run(serve: Callable[..., Served], browser: Any) -> Iterator[Callable[..., Any]]:
    """Evaluates an expression with a module as `m`: `run("lib/cost.js", "m.costPerMillion(...given)", 1, 2)`."""
    base = serve().base
    with watched_page(browser, base) as (page, _):
        page.goto(base)

        def call(module: str, expression: str, *given: object) -> Any:
            script = f"async (given) => {{ const m = await import('./explorer/{module}'); return {expression}; }}"
            return page.evaluate(script, list(given))

        yield call


def test_events_are_the_same_however_the_stream_is_cut(run: Callable[..., Any]) -> None:
    cut = """(() => {
        const bytes = new TextEncoder().encode(given[0]);
        const all = [];
        for (let at = 0; at <= bytes.length; at++) {
            const parser = new m.SseParser(), decoder = new TextDecoder("utf-8", {ignoreBOM: true});
            const texts = [bytes.slice(0, at), bytes.slice(at)].map((part, i) => decoder.decode(part, {stream: !i}));
            all.push(texts.flatMap((text) => parser.feed(text)));
        }
        const single = new m.SseParser();
        all.push([...given[0]].flatMap((character) => single.feed(character)));
        return all;
    })()"""
    found = run("lib/sse.js", cut, STREAM)
    assert len(found) == len(STREAM.encode()) + 2
    assert all(events == EVENTS for events in found)


def test_metrics_are_read_as_prometheus_client_reads_them(run: Callable[..., Any]) -> None:
    text = METRICS.read_text() + 'odd{a="x\\"y\\\\z\\n,}",b=""} 1.5e3 1700000000\nendless +Inf\n'
    found = run("lib/prometheus.js", "m.parseMetrics(given[0]).map((s) => [s.name, s.labels, String(s.value)])", text)
    expected = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    read = [(name, labels, float(value.replace("Infinity", "inf"))) for name, labels, value in found]
    assert len(read) > 250
    assert read == [(sample.name, sample.labels, sample.value) for sample in expected]


@pytest.mark.parametrize(
    ("q", "buckets", "expected"),
    [
        (0.5, [(1, 5), (2, 10), ("inf", 10)], 1),
        (0.75, [("inf", 10), (2, 10), (1, 5)], 1.5),
        (0.1, [(1, 5), (2, 10), ("inf", 10)], 0.2),
        (0.99, [(1, 5), (2, 6), ("inf", 10)], 2),
        (0.5, [(1, 0), (2, 0), ("inf", 0)], None),
        (0.5, [(1, 5)], None),
        (0.5, [], None),
    ],
)
def test_quantiles_are_those_of_prometheus(run: Callable[..., Any], q: float, buckets: Any, expected: Any) -> None:
    expression = "m.quantile(given[0], given[1].map(([b, n]) => [b === 'inf' ? Infinity : b, n]))"
    found = run("lib/prometheus.js", expression, q, buckets)
    assert found == (expected if expected is None else pytest.approx(expected))


def test_counters_survive_restarts_and_missing_replicas(run: Callable[..., Any]) -> None:
    """A restart counts from 0, a replica that was missing from the first scrape adds nothing, a new code counts."""
    scrapes = [
        [["n", {"replica": "a"}, 100]],
        [["n", {"replica": "a"}, 110], ["n", {"replica": "b"}, 5000], ["n", {"status": "429"}, 3]],
        [["n", {"replica": "a"}, 4], ["n", {"status": "429"}, 5]],
        [["n", {"replica": "a"}, 4], ["n", {"replica": "b"}, 5001]],
    ]
    expression = """(() => {
        const counters = new m.Counters(({name}) => name);
        return given[0].map((scrape) =>
            counters.add(scrape.map(([name, labels, value]) => ({name, labels, value}))).get("n"));
    })()"""
    assert run("lib/prometheus.js", expression, scrapes) == [0, 13, 19, 20]


def test_load_is_rates_and_percentiles_per_model(run: Callable[..., Any]) -> None:
    def scrape(n: int, busy: int, running: int) -> str:
        label = 'model="m",method="awq"'
        return (
            f"quantserve_requests_in_progress{{{label}}} {running}\n"
            f"quantserve_queue_length{{{label}}} 2\n"
            f'quantserve_requests_total{{{label},path="/",status="200",code=""}} {n}\n'
            f'quantserve_requests_total{{{label},path="/",status="429",code="queue_full"}} {busy}\n'
            f'vllm:generation_tokens_total{{{label},replica="r"}} {50 * n}\n'
            f'vllm:time_to_first_token_seconds_bucket{{{label},replica="r",le="0.1"}} {n}\n'
            f'vllm:time_to_first_token_seconds_bucket{{{label},replica="r",le="+Inf"}} {n}\n'
        )

    expression = """(() => {
        const series = new m.LoadSeries(30);
        for (const [time, text] of given[0]) series.add(time, text);
        return [series.times, series.models.get("m")];
    })()"""
    texts = [(0, scrape(10, 0, 1)), (5, scrape(20, 5, 3)), (10, scrape(40, 10, 0)), (40, scrape(40, 10, 0))]
    times, points = run("lib/load.js", expression, texts)
    assert times == [40]  # the others are older than 30 s
    times, points = run("lib/load.js", expression, texts[:3])
    assert points["running"] == [1, 3, 0]
    assert points["queued"] == [2, 2, 2]
    assert points["requests"] == [None, 3, 4]
    assert points["busy"] == [None, 1, 1]
    assert points["tokens"] == [None, 100, 150]
    assert points["ttft50"] == [None, pytest.approx(0.05), pytest.approx(0.05)]
    assert points["tpot50"] == [None, None, None]


def tokens(*texts: str) -> list[dict[str, Any]]:
    return [{"text": text, "logprob": -0.5, "top": []} for text in texts]


@pytest.mark.parametrize(
    ("reference", "other", "ended", "expected"),
    [
        (("a", " b", " c"), ("a", " x"), False, (1, 1, True)),
        (("a", " b"), ("a",), False, None),
        (("a", " b"), ("a",), True, (1, 1, True)),
        (("a",), ("a", " b"), True, (1, 1, True)),
        (("a", " b"), ("a", " b"), True, None),
        ((), (), True, None),
        (("ab", "c", "d"), ("a", "bc", "x"), False, (2, 2, False)),
        (("ab", "c"), ("a", "x"), False, (1, 0, False)),
    ],
)
def test_the_first_difference(
    run: Callable[..., Any], reference: Any, other: Any, ended: bool, expected: tuple[int, int, bool] | None
) -> None:
    found = run("lib/divergence.js", "m.divergence(...given)", tokens(*reference), tokens(*other), ended)
    assert (found and (found["index"], found["referenceIndex"], found["comparable"])) == expected


def test_both_distributions_likeliest_first(run: Callable[..., Any]) -> None:
    def token(text: str, **top: float) -> dict[str, Any]:
        listed = [{"text": name, "logprob": math.log(p)} for name, p in top.items()]
        return {"text": text, "logprob": math.log(top[text]), "top": listed}

    rows = run("lib/divergence.js", "m.distributions(...given)", token("a", a=0.6, b=0.2), token("b", b=0.7, c=0.1))
    assert [row["text"] for row in rows] == ["b", "a", "c"]
    assert [(row["reference"], row["other"]) for row in rows] == [
        (pytest.approx(0.2), pytest.approx(0.7)),
        (pytest.approx(0.6), None),
        (None, pytest.approx(0.1)),
    ]


def test_cost(run: Callable[..., Any]) -> None:
    assert run("lib/cost.js", "m.costPerMillion(3.6, 1000)") == pytest.approx(1)
    assert run("lib/cost.js", "m.costPerMillion(0, 1000)") == 0
    for given in ("null, 5", "undefined, 5", "1, null", "1, 0"):
        assert run("lib/cost.js", f"m.costPerMillion({given})") is None


def test_markdown_cannot_be_broken_out_of(run: Callable[..., Any]) -> None:
    answer = {
        "model": "a|b_*",
        "method": "awq",
        "text": "```\n# no heading\n````",
        "ttft_ms": 12.34,
        "tpot_ms": None,
        "tokens_per_s": 0.5,
        "tokens": 3,
        "error": None,
        "first_difference": {
            "from": "r",
            "token": 1,
            "here": " `|",
            "there": "",
            "distributions": [{"token": " `|", "here": 0.5, "there": None}],
        },
    }
    question = {"prompt": "p", "system": "", "temperature": 0, "maxTokens": 5, "seed": None}
    text = run("lib/share.js", "m.toMarkdown(m.comparison(given[0], given[1], '1'))", question, [answer])
    assert "| a\\|b\\_\\* | awq | 12.3 ms | \u2013 | 0.5 | 3 |" in text
    assert "`````text\n```\n# no heading\n````\n`````" in text
    assert "at token 2: `` ␣`\\| `` here, `end` there" in text


def test_a_link_holds_the_question(run: Callable[..., Any]) -> None:
    question = {"prompt": "a&b=c#d\n%", "system": "s", "temperature": 0.5, "maxTokens": 5, "seed": 3}
    read = run("lib/share.js", "m.fromQuery(m.toQuery(...given))", question, ["m/1", "m 2"])
    assert read == {**question, "models": ["m/1", "m 2"]}
    nothing = run("lib/share.js", "m.fromQuery('temperature=x')")
    assert nothing == {**dict.fromkeys(question), "models": []}


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (429, {"code": "queue_full"}, "busy.*Retry in 7 s"),
        (429, {"code": "key_limit"}, "this key"),
        (401, {"code": "invalid_api_key"}, "key needed"),
        (503, {"code": "model_unavailable"}, "no replica"),
        (504, {"code": "timeout"}, "too long"),
        (0, {"code": "shutdown"}, "stops"),
        (0, {"code": "network"}, "No connection"),
        (0, {}, "failed while it answered"),
        (400, {"code": "invalid_value"}, "refused the request"),
        (500, {}, "server failed"),
        (502, {}, "server failed"),
    ],
)
def test_errors_are_explained(run: Callable[..., Any], status: int, error: dict[str, str], says: str) -> None:
    found = run("lib/errors.js", "m.explain(new m.ApiError(...given))", status, {**error, "message": "why"}, 7)
    assert re.search(says, " ".join(found.values()))
    assert found["detail"] == "why"
    assert found["todo"]
