"""Expected beside measured: a ratio and a verdict per metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from quantserve_bench.measured import Measured
from quantserve_bench.metrics import METRICS

AS_EXPECTED: Final = (0.8, 1.25)
"""Scores in this range are as expected: within a factor of 1.25."""


@dataclass(frozen=True)
class Verdict:
    """One metric, expected and measured.

    Attributes:
        key: of `METRICS` or `TOTALS`.
        label, unit: for people.
        expected, measured: means, in the metric's unit.
        ratio: measured / expected.
        score: above 1 is better than expected: the ratio, or its inverse where lower is better.
        verdict: ``better``, ``as expected`` or ``worse``.
    """

    key: str
    label: str
    unit: str
    expected: float
    measured: float
    ratio: float
    score: float
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def compare(expected: Mapping[str, Any] | None, measured: Measured) -> list[Verdict]:
    """Verdicts for each metric that has both numbers.

    Args:
        expected: a performance profile as JSON, as under ``metadata.expected_performance`` in ``/v1/models``; it may
            hold ``tpot_ms`` and ``all_users_tokens_per_s`` as well.
        measured: the run.
    """
    verdicts = []
    for name, key in _keys(expected or {}).items():
        wanted = (expected or {}).get(name)
        if key in METRICS:
            metric = METRICS[key]
            found, label, unit, higher = measured.mean(key), metric.label, metric.unit, metric.higher_is_better
        else:
            found, label, unit, higher = measured.totals.get(key), "tok/s of all users", "tok/s", True
        if not isinstance(wanted, int | float) or wanted <= 0 or not found:
            continue
        ratio = found / wanted
        score = ratio if higher else 1 / ratio
        low, high = AS_EXPECTED
        word = "worse" if score < low else "better" if score > high else "as expected"
        verdicts.append(Verdict(key, label, unit, float(wanted), found, ratio, score, word))
    return verdicts


def _keys(expected: Mapping[str, Any]) -> dict[str, str]:
    """Keys of a performance profile -> keys of `METRICS` or `TOTALS`, by the definition of ITL in the profile."""
    with_ttft = "E2E" in str(expected.get("itl_definition", "E2E"))
    return {
        "e2e_ms": "e2e",
        "ttft_ms": "ttft",
        "itl_ms": "normalized" if with_ttft else "tpot",
        **({"tpot_ms": "tpot"} if with_ttft else {}),
        "output_tokens_per_s": "tokens_per_s",
        "all_users_tokens_per_s": "output_tokens_per_s",
    }


def lowest(verdicts: Sequence[Verdict]) -> Verdict | None:
    """The verdict with the lowest score."""
    return min(verdicts, key=lambda verdict: verdict.score, default=None)
