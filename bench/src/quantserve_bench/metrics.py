"""The metrics, each with its definition and its names in other tools.

Names alone are ambiguous: one tool's TPOT is another one's ITL. So `METRICS` has the formula of every metric in words,
and every report prints it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from quantserve_bench.timing import Timing


@dataclass(frozen=True)
class Metric:
    """A metric of one request, summarized over all complete answers.

    Attributes:
        key: in files.
        label: for people.
        unit: ``ms``, ``tok/s``, ``tokens`` or empty; values in ms are kept in seconds until they are written.
        definition: the formula in words.
        of: its values in one answer; several for gaps, none where it has no meaning.
        llmperf, vllm, guidellm: the name of the same or the closest metric in these tools.
        higher_is_better: for verdicts and plots; None for neither.
    """

    key: str
    label: str
    unit: str
    definition: str
    of: Callable[[Timing], Sequence[float]]
    llmperf: str = ""
    vllm: str = ""
    guidellm: str = ""
    higher_is_better: bool | None = False

    @property
    def scale(self) -> float:
        """From the value as computed to the unit."""
        return 1000.0 if self.unit == "ms" else 1.0


def _one(name: str) -> Callable[[Timing], Sequence[float]]:
    def values(timing: Timing) -> Sequence[float]:
        value = getattr(timing, name)
        return () if value is None else (value,)

    return values


METRICS: Final[Mapping[str, Metric]] = {
    metric.key: metric
    for metric in (
        Metric(
            "ttft",
            "TTFT",
            "ms",
            "from sending the request to the first event with content, reasoning or a tool call",
            _one("ttft_s"),
            vllm="ttft (includes the empty event at the start of a chat)",
            guidellm="time_to_first_token_ms",
        ),
        Metric(
            "ttft_content",
            "TTFT, content",
            "ms",
            "from sending the request to the first event with content; reasoning does not count",
            _one("first_content_s"),
            llmperf="ttft_s",
        ),
        Metric(
            "first_byte",
            "First byte",
            "ms",
            "from sending the request to the end of the response's headers",
            _one("first_byte_s"),
        ),
        Metric(
            "tpot",
            "TPOT",
            "ms",
            "(last event with a token - first) / (output tokens - 1), of answers with two tokens or more",
            _one("tpot_s"),
            vllm="tpot",
            guidellm="inter_token_latency_ms",
        ),
        Metric(
            "itl",
            "ITL, chunk gaps",
            "ms",
            "between consecutive events with a token, of all answers together; TTFT excluded, not divided by the "
            "tokens of an event, 0 between events of one read",
            lambda timing: timing.gaps_s,
            vllm="itl",
        ),
        Metric(
            "e2e",
            "E2E",
            "ms",
            "from sending the request to the end of the response",
            _one("e2e_s"),
            llmperf="end_to_end_latency_s",
            vllm="e2el (to the last event with choices)",
            guidellm="request_latency",
        ),
        Metric(
            "normalized",
            "ITL, E2E / tokens",
            "ms",
            "E2E / output tokens, TTFT included: the ITL of llmperf and of the RayLLM tables",
            _one("normalized_s"),
            llmperf="inter_token_latency_s (divided by the number of chunks)",
            guidellm="time_per_output_token_ms (to the last token)",
        ),
        Metric(
            "tokens_per_s",
            "tok/s per user",
            "tok/s",
            "output tokens / E2E of one request, TTFT included: the throughput of the RayLLM tables",
            _one("tokens_per_s"),
            llmperf="request_output_throughput_token_per_s",
            higher_is_better=True,
        ),
        Metric(
            "decode_tokens_per_s",
            "tok/s per user, decode",
            "tok/s",
            "1 / TPOT of one request",
            _one("decode_tokens_per_s"),
            higher_is_better=True,
        ),
        Metric("queue", "Client queue", "ms", "time a due request waited in the client", _one("queue_s")),
        Metric(
            "input_tokens",
            "Input tokens",
            "tokens",
            "the server's usage.prompt_tokens, including the chat template; without it the workload's target",
            _one("input_tokens"),
            llmperf="number_input_tokens (always the target)",
            guidellm="prompt_token_count",
            higher_is_better=None,
        ),
        Metric(
            "output_tokens",
            "Output tokens",
            "tokens",
            "the server's usage.completion_tokens; without it counted by the tokenizer, without special tokens; else "
            "one token per event",
            _one("output_tokens"),
            llmperf="number_output_tokens (by Llama's tokenizer, with BOS)",
            guidellm="output_token_count",
            higher_is_better=None,
        ),
        Metric(
            "tokens_per_event",
            "Tokens per event",
            "",
            "output tokens / events with a token; above 1 the server groups tokens, and chunk gaps are not token gaps",
            _one("tokens_per_event"),
            higher_is_better=None,
        ),
    )
}

TOTALS: Final[Mapping[str, tuple[str, str]]] = {
    "duration_s": ("s", "from before the first request to the last answer"),
    "requests": ("", "requests sent, without the warm-up"),
    "completed": ("", "complete answers"),
    "errors": ("", "requests without a complete answer, by code in `error_codes`"),
    "error_rate": ("", "errors / requests"),
    "requests_per_s": ("1/s", "complete answers / duration"),
    "requests_per_min": ("1/min", "complete answers / duration x 60"),
    "output_tokens_per_s": ("tok/s", "output tokens of complete answers / duration, of all users together"),
    "total_tokens_per_s": ("tok/s", "input and output tokens of complete answers / duration"),
    "peak_output_tokens_per_s": ("tok/s", "most output tokens in one second of the run"),
    "goodput_per_s": ("1/s", "complete answers within all limits of --slo / duration"),
    "goodput_share": ("", "complete answers within all limits of --slo / requests"),
    "concurrency_mean": ("", "mean number of requests in flight in the steady window"),
    "concurrency_max": ("", "largest number of requests in flight"),
    "steady_s": ("s", "length of the steady window, in which all users are active or the open load sends"),
    "steady_output_tokens_per_s": ("tok/s", "output tokens that arrived in the steady window / its length"),
    "client_share": ("", "share of one core that the client used; above 0.5 it may limit the results"),
    "loop_lag_mean_ms": ("ms", "mean delay of the client's event loop; the possible error of time stamps"),
    "loop_lag_max_ms": ("ms", "largest delay of the client's event loop"),
}  # fmt: skip
"""Numbers of the whole run: unit and definition."""
