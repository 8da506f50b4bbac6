"""How answers are compared, and the intervals, against published values."""

from __future__ import annotations

import math

import pytest

from quantserve_client.intervals import mcnemar, paired, wilson, win_rate
from quantserve_client.judge import compared, verdict
from quantserve_client.scoring import is_right, last_number


@pytest.mark.parametrize(
    ("match", "answer", "references", "right"),
    [
        ("exact", "  Paris. ", ["paris"], True),
        ("exact", "**Paris**", ["Paris"], True),
        ("exact", "\uff30\uff41ris", ["Paris"], True),  # full-width letters
        ("exact", "It is Paris", ["Paris"], False),
        ("exact", "<think>Rome?</think>Paris", ["Paris"], True),
        ("exact", "b", ["a", "b"], True),
        ("contains", "The capital is Paris, of course.", ["paris"], True),
        ("contains", "I know", ["no"], False),
        ("contains", "know, and no", ["no"], True),
        ("contains", "in C++ it is", ["C++"], True),
        ("contains", "", ["a"], False),
        ("regex", "abc 42", [r"\b4\d$"], True),
        ("regex", "abc", [r"^b"], False),
        ("numeric", "2 + 2 = 4", ["4"], True),
        ("numeric", "about 1,234.50 euros.", ["1234.5"], True),
        ("numeric", "the values 1,2,3", ["3"], True),
        ("numeric", "It is \u22125", ["-5"], True),
        ("numeric", "4, not 5", ["4"], False),
        ("numeric", "none", ["4"], False),
        ("numeric", "5-7", ["7"], True),
        ("numeric", "x=-.5", ["-0.5"], True),
        ("exact", "Rome? </think>\n\nParis", ["Paris"], True),
        ("numeric", "1e3", ["1000"], True),
        ("numeric", "0.3333", ["0.333333333"], False),
    ],
)
def test_matches(match: str, answer: str, references: list[str], right: bool) -> None:
    assert is_right(answer, match, references) is right


def test_tolerance_is_relative() -> None:
    assert is_right("99", "numeric", ["100"], 0.01)
    assert not is_right("98", "numeric", ["100"], 0.01)
    assert is_right("0.001", "numeric", ["0"], 0.01)
    assert last_number("costs 12.") == 12


def test_wilson() -> None:
    """Newcombe 1998 (doi:10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E), table I, method 3."""
    assert [round(x, 4) for x in wilson(81, 263)[1:] if x is not None] == [0.2553, 0.3662]
    assert [round(x, 4) for x in wilson(15, 148)[1:] if x is not None] == [0.0624, 0.1605]
    assert [round(x, 4) for x in wilson(0, 20)[1:] if x is not None] == [0.0, 0.1611]
    assert (wilson(0, 10).low, wilson(10, 10).high) == (0.0, 1.0)
    assert wilson(0, 0) == (None, None, None)


def test_paired_difference_covers_the_truth() -> None:
    """95 % intervals hold the true difference in about 95 % of all samples: the binomial sum over two small tables."""
    for only_first, only_second, count in ((0.3, 0.1, 30), (0.15, 0.15, 40)):
        covered = 0.0
        for b in range(count + 1):
            for c in range(count + 1 - b):
                chance = math.exp(
                    math.lgamma(count + 1) - math.lgamma(b + 1) - math.lgamma(c + 1) - math.lgamma(count - b - c + 1)
                    + b * math.log(only_first) + c * math.log(only_second)
                    + (count - b - c) * math.log(1 - only_first - only_second)
                )  # fmt: skip
                _, low, high = paired(b, c, count)
                assert low is not None
                assert high is not None
                covered += chance * (low <= only_first - only_second <= high)
        assert 0.93 < covered < 0.985


def test_mcnemar_is_the_binomial_test() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar(0, 6) == pytest.approx(2 / 64)
    assert mcnemar(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(8, 2) == mcnemar(2, 8)
    assert 0 < mcnemar(400, 2000) < 1e-200


def test_win_rate_counts_ties_as_half() -> None:
    value, low, high = win_rate(6, 2, 10)
    assert value == pytest.approx(0.7)
    assert low is not None
    assert high is not None
    assert 0 <= low < 0.7 < high <= 1
    assert win_rate(0, 0, 0) == (None, None, None)


def test_verdicts() -> None:
    assert verdict("Both fine.\nVerdict: 1") == "1"
    assert verdict("**Verdict: TIE**") == "tie"
    assert verdict("Verdict: 1\nNo, wait.\nverdict: 2.") == "2"
    assert verdict("<think>Verdict: 1</think>Verdict: 2") == "2"
    for unclear in ("", "1", "Answer 1 is better", "Verdict: 3", "Verdict: 1 or 2", "The verdict: 1 is better"):
        assert verdict(unclear) is None


def test_both_orders_count() -> None:
    pairs = [
        ("1", "2"),
        ("2", "1"),
        ("1", "1"),
        ("2", "2"),
        ("tie", "tie"),
        ("1", "tie"),
        ("tie", "1"),
        ("1", None),
        None,
    ]
    found = compared("a", "b", pairs)
    assert (found.wins, found.losses, found.ties, found.contradictions) == (2, 2, 3, 2)
    assert (found.unclear, found.unanswered, found.count) == (1, 1, 7)
    assert found.rate.value == pytest.approx(0.5)
    assert found.first_place.value == pytest.approx(7 / 11)
