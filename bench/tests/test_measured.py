"""Formulas against cases worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from quantserve_bench import Closed, Open, Request, Rounds, Target, run, run_blocking
from quantserve_bench.measured import measure, per_second, steady_window
from quantserve_bench.metrics import METRICS, TOTALS
from quantserve_bench.peers import vllm_result
from quantserve_bench.timing import timing_of
from quantserve_bench.verdicts import compare, lowest

from .fake_server import DONE, END, FINISH, FakeServer, chunk, delta, head, stream, usage, whole
from .made import chat, made_run, refusal, result


def test_one_answer() -> None:
    """Role at 0.1, tokens at 0.2, 0.3 and two at 0.5, usage 5 tokens, end at 0.6, sent 0.05 late."""
    timing = timing_of(
        chat([(0.2, ["a"]), (0.3, ["b"]), (0.5, ["c", "d"])], prompt=40, count=5, start=10.0, tail=0.1, scheduled=9.95)
    )
    assert timing.queue_s == pytest.approx(0.05)
    assert timing.first_byte_s == pytest.approx(0.1)
    assert timing.first_choice_s == pytest.approx(0.1)
    assert timing.ttft_s == pytest.approx(0.2)
    assert timing.e2e_s == pytest.approx(0.6)
    assert timing.last_choice_s == pytest.approx(0.6)
    assert timing.tpot_s == pytest.approx((0.5 - 0.2) / 4)
    assert timing.vllm_tpot_s == pytest.approx((0.6 - 0.1) / 4)
    assert timing.gaps_s == pytest.approx((0.1, 0.2, 0.0))
    assert timing.normalized_s == pytest.approx(0.6 / 5)
    assert timing.tokens_per_s == pytest.approx(5 / 0.6)
    assert timing.decode_tokens_per_s == pytest.approx(4 / 0.3)
    assert (timing.output_tokens, timing.source, timing.input_tokens) == (5, "usage", 40)
    assert (timing.events, timing.reads, timing.tokens_per_event) == (4, 3, 1.25)


def test_reasoning_counts_for_ttft_but_not_as_content() -> None:
    reads = [
        (0.1, head() + chunk(delta(role="assistant", content=""))),
        (0.2, chunk(delta(reasoning_content="hm"))),
        (0.5, chunk(delta(content="yes"))),
        (0.6, chunk(FINISH) + chunk(usage(1, 2)) + chunk(DONE) + END),
    ]
    timing = timing_of(result(reads))
    assert timing.ttft_s == pytest.approx(0.2)
    assert timing.first_content_s == pytest.approx(0.5)
    assert timing.tpot_s == pytest.approx(0.3)


def test_one_token_and_none() -> None:
    single = timing_of(chat([(0.2, ["a"])]))
    assert (single.tpot_s, single.gaps_s, single.ttft_s) == (None, (), 0.2)
    nothing = timing_of(chat([]))
    assert (nothing.ttft_s, nothing.tpot_s, nothing.normalized_s, nothing.tokens_per_s) == (None, None, None, None)
    measured = measure(made_run([chat([]), chat([(0.2, ["a"])])]))
    assert measured.summaries["ttft"].count == 1  # a missing TTFT is no zero
    assert measured.summaries["e2e"].count == 2
    assert "tpot" not in measured.summaries


def test_without_the_servers_count() -> None:
    uncounted = chat([(0.2, ["a b"]), (0.3, ["c"])], counted=False)
    assert timing_of(uncounted).source == "events"
    assert timing_of(uncounted).output_tokens == 2
    assert timing_of(uncounted).input_tokens == 100  # the workload's target
    by_words = timing_of(uncounted, lambda text: len(text.split()) + 5)
    assert (by_words.source, by_words.output_tokens) == ("tokenizer", 7)
    measured = measure(made_run([uncounted, chat([(0.2, ["a"])])]))
    assert measured.sources == {"events": 1, "usage": 1}


def test_without_streaming_there_is_no_ttft() -> None:
    answer = {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 3, "completion_tokens": 9}}
    timing = timing_of(result([(0.3, whole(200, answer))], request=Request(prompt="x", stream=False)))
    assert (timing.ttft_s, timing.tpot_s, timing.events) == (None, None, 0)
    assert timing.normalized_s == pytest.approx(0.3 / 9)


def test_a_run() -> None:
    """Two users, three answers and a refusal: all totals by hand.

    User 1: 0.0 to 1.0 (4 tokens), 1.0 to 2.0 (2 tokens). User 2: 0.0 to 1.5 (3 tokens), 1.5 to 1.51 (refused).
    """
    a = chat([(0.4, ["a"]), (0.6, ["b"]), (0.8, ["c"]), (1.0, ["d"])], prompt=10)
    b = chat([(0.5, ["a"]), (1.0, ["b"]), (1.5, ["c"])], prompt=20)
    c = chat([(0.5, ["a"]), (1.0, ["b"])], prompt=30, start=1.0)
    d = refusal(503, start=1.5)
    measured = measure(made_run([a, b, c, d], Closed(2), ended=2.0), slo={"ttft": 450, "e2e": 1200})
    totals = measured.totals
    assert set(totals) == set(TOTALS)
    assert (totals["requests"], totals["completed"], totals["errors"], totals["error_rate"]) == (4, 3, 1, 0.25)
    assert measured.error_codes == {"503": 1}
    assert measured.error_messages == {"503": "refused with 503"}
    assert totals["duration_s"] == 2.0
    assert totals["requests_per_s"] == 1.5
    assert totals["requests_per_min"] == 90
    assert totals["output_tokens_per_s"] == pytest.approx(9 / 2)
    assert totals["total_tokens_per_s"] == pytest.approx((9 + 60) / 2)
    # Seconds: [0, 1) holds a's 0.4 0.6 0.8 and b's 0.5; [1, 2) a's 1.0, b's 1.0 1.5, c's 1.5; then c's at 2.0.
    assert totals["peak_output_tokens_per_s"] == 4
    assert totals["concurrency_max"] == 2
    # The window: both have joined at 0.0, the last request is sent at 1.5; two are on their way all the time.
    assert (totals["steady_s"], totals["concurrency_mean"]) == (1.5, 2.0)
    assert totals["steady_output_tokens_per_s"] == pytest.approx(8 / 1.5)
    # a: TTFT 400, E2E 1000: kept. b: TTFT 500, E2E 1500. c: TTFT 500. Of four requests one.
    assert totals["goodput_per_s"] == 0.5
    assert totals["goodput_share"] == 0.25
    assert totals["client_share"] == 0.25
    assert measured.mean("e2e") == pytest.approx(1000 * (1.0 + 1.5 + 1.0) / 3)
    assert measured.mean("ttft") == pytest.approx(1000 * (0.4 + 0.5 + 0.5) / 3)
    assert measured.mean("tpot") == pytest.approx(1000 * (0.2 + 0.5 + 0.5) / 3)
    assert measured.summaries["itl"].count == 3 + 2 + 1
    assert measured.mean("itl") == pytest.approx(1000 * (3 * 0.2 + 2 * 0.5 + 0.5) / 6)
    assert measured.mean("normalized") == pytest.approx(1000 * (1.0 / 4 + 1.5 / 3 + 1.0 / 2) / 3)
    assert measured.mean("tokens_per_s") == pytest.approx((4 + 2 + 2) / 3)


def test_the_mean_of_inverses_is_not_the_inverse_of_the_mean() -> None:
    """Why the two RayLLM columns differ for SqueezeLLM 13B: a few answers with very few tokens."""
    short, long = chat([(1.0, ["a"])]), chat([(0.1, ["a"]), (1.0, ["b"] * 9)])
    measured = measure(made_run([short, long]))
    assert measured.mean("normalized") == pytest.approx(1000 * (1.0 + 0.1) / 2)
    assert measured.mean("tokens_per_s") == pytest.approx((1 + 10) / 2)


def test_windows() -> None:
    results = [chat([(0.5, ["a"])], start=at) for at in (0.0, 0.2, 0.4, 0.5, 0.9)]
    assert steady_window(made_run(results, Closed(3))) == (0.4, 0.9)
    assert steady_window(made_run(results, Rounds(3))) == (0.0, 1.4)
    assert steady_window(made_run(results, Open(5.0))) == (0.0, 0.9)
    assert steady_window(made_run(results, Closed(99))) == (0.9, 0.9)
    assert steady_window(made_run(results, Closed(2, ramp_s=1.0))) == (0.5, 0.9)  # the second user joins at 0.5
    only_errors = measure(made_run([refusal(500)]))
    assert only_errors.totals["completed"] == 0
    assert only_errors.summaries == {}


def test_seconds() -> None:
    assert per_second([(10.0, 1), (10.9, 2), (11.0, 4), (12.5, 8)], 10.0, 12.5) == [3, 4, 8]
    assert per_second([], 0.0, 0.5) == [0]


def test_goodput_of_a_single_token_keeps_any_tpot() -> None:
    measured = measure(made_run([chat([(0.2, ["a"])]), chat([(0.1, ["a"]), (0.4, ["b"])])]), slo={"tpot": 100})
    assert measured.totals["goodput_share"] == 0.5


def test_vllm_names() -> None:
    a = chat([(0.2, ["a"]), (0.3, ["b"]), (0.5, ["c", "d"])], prompt=40, count=5, tail=0.1)
    b = chat([(0.4, ["a"]), (0.6, ["b"])], prompt=10, start=0.6)
    out = vllm_result(made_run([a, b, refusal(500, start=1.2)], ended=2.0))
    assert (out["completed"], out["failed"]) == (2, 1)
    assert (out["total_input_tokens"], out["total_output_tokens"]) == (50, 7)
    assert out["output_throughput"] == pytest.approx(7 / 2)
    assert out["total_token_throughput"] == pytest.approx(57 / 2)
    assert out["mean_ttft_ms"] == pytest.approx(1000 * (0.1 + 0.2) / 2)  # the role counts there
    assert out["std_ttft_ms"] == pytest.approx(50)  # population
    assert out["mean_e2el_ms"] == pytest.approx(1000 * (0.6 + 0.6) / 2)
    assert out["mean_tpot_ms"] == pytest.approx(1000 * ((0.6 - 0.1) / 4 + (0.6 - 0.2) / 1) / 2)
    # Gaps between events with choices: 0.1 0.1 0.2 0 0.1 and 0.2 0.2 0.
    assert out["mean_itl_ms"] == pytest.approx(1000 * (0.5 + 0.4) / 8)
    assert out["median_itl_ms"] == pytest.approx(100)


def test_a_whole_run_against_the_servers_own_clock() -> None:
    """Delays, bursts and errors of a real socket: what is measured is what the server did."""

    def script(number: int, body: dict[str, Any]) -> Any:
        if number == 3:
            return [whole(503, {"error": {"message": "full"}})]
        return stream([(0.1, ["a"]), (0.05, ["b", "c"]), (0.05, ["d"])], prompt=10 + number)

    with FakeServer(script) as server:
        asked = [Request(messages=[{"role": "user", "content": "x"}]) for _ in range(6)]
        done = run_blocking(run(Target(server.url, "m"), asked, Closed(2)))
    measured = measure(done)
    assert (measured.totals["completed"], measured.error_codes) == (5, {"503": 1})
    truths = [exchange for exchange in server.exchanges if len(exchange.writes) > 1]
    late = 250.0  # ms, on a busy machine
    true_ttft = 1000 * sum(x.writes[2] - x.came for x in truths) / len(truths)
    true_tpot = 1000 * sum((x.writes[4] - x.writes[2]) / 3 for x in truths) / len(truths)
    assert true_ttft <= (measured.mean("ttft") or 0) < true_ttft + late
    assert measured.mean("tpot") == pytest.approx(true_tpot, abs=late / 3)
    assert measured.mean("tokens_per_event") == 1
    assert measured.summaries["input_tokens"].minimum == 10
    assert measured.totals["output_tokens_per_s"] == pytest.approx(20 / done.duration_s)


EXPECTED = {"e2e_ms": 1000.0, "ttft_ms": 250.0, "itl_ms": 400.0, "output_tokens_per_s": 4.0}


def test_verdicts() -> None:
    """E2E 1000 as expected, TTFT 500 twice too long, E2E / tokens 500, tok/s 2 half of it."""
    measured = measure(made_run([chat([(0.5, ["a"]), (1.0, ["b"])])]))
    verdicts = {verdict.key: verdict for verdict in compare(EXPECTED, measured)}
    assert {key: verdict.verdict for key, verdict in verdicts.items()} == {
        "e2e": "as expected",
        "ttft": "worse",
        "normalized": "as expected",
        "tokens_per_s": "worse",
    }
    assert (verdicts["ttft"].ratio, verdicts["ttft"].score) == (2.0, 0.5)
    assert verdicts["normalized"].ratio == pytest.approx(1.25)
    assert (verdicts["tokens_per_s"].ratio, verdicts["tokens_per_s"].score) == (0.5, 0.5)
    assert compare({**EXPECTED, "ttft_ms": 900.0}, measured)[1].verdict == "better"
    worst = lowest(list(verdicts.values()))
    assert worst is not None
    assert worst.score == 0.5
    # What an ITL without TTFT means is compared with TPOT.
    tpot = compare({"itl_ms": 500.0, "itl_definition": "(last - first) / (n - 1)"}, measured)
    assert [(verdict.key, verdict.ratio) for verdict in tpot] == [("tpot", 1.0)]
    assert compare(None, measured) == []
    assert compare({"e2e_ms": None, "ttft_ms": 0}, measured) == []


def test_every_metric_has_a_definition() -> None:
    for key, metric in METRICS.items():
        assert metric.key == key
        assert len(metric.definition) > 20
    names = {name for metric in METRICS.values() for name in (metric.llmperf, metric.vllm, metric.guidellm)}
    assert {"tpot", "inter_token_latency_ms", "ttft_s", "request_output_throughput_token_per_s"} <= names
