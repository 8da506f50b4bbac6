"""A model as a judge: it compares two answers in both orders, so that its liking for the first one cancels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from quantserve_client.intervals import Share, wilson, win_rate
from quantserve_client.questions import Question
from quantserve_client.scoring import THOUGHT

INSTRUCTION: Final = (
    "You compare two answers to the same question. Judge whether they are correct, complete and follow the question's "
    "instructions. Neither the order of the answers nor their length counts. Explain in at most three sentences. Then "
    "write one last line with your verdict, exactly one of:\nVerdict: 1\nVerdict: 2\nVerdict: tie"
)
VERDICT: Final = re.compile(r"^\W*verdict\W*(1|2|tie)\W*$", re.IGNORECASE | re.MULTILINE)
MAX_TOKENS: Final = 512


@dataclass(frozen=True)
class Comparison:
    """Two models compared by a judge.

    Attributes:
        first, second: ids of the models.
        wins, losses, ties: of the first, over both orders: a win and a tie are a win, a win and a loss a tie.
        contradictions: ties of a win and a loss.
        unclear: comparisons without two readable verdicts; not counted.
        unanswered: questions that one of the models, or the judge, did not answer; not counted.
        first_place: share of decided verdicts for the answer that was shown first; 0.5 without a bias.
    """

    first: str
    second: str
    wins: int
    losses: int
    ties: int
    contradictions: int
    unclear: int
    unanswered: int
    first_place: Share

    @property
    def count(self) -> int:
        """Comparisons that count."""
        return self.wins + self.losses + self.ties

    @property
    def rate(self) -> Share:
        """The win rate of the first model, ties as half."""
        return win_rate(self.wins, self.losses, self.count)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        value, low, high = self.rate
        place, place_low, place_high = self.first_place
        return {
            **{name: getattr(self, name) for name in ("first", "second", "wins", "losses", "ties", "contradictions")},
            "unclear": self.unclear,
            "unanswered": self.unanswered,
            "win_rate": {"value": value, "low": low, "high": high},
            "first_place": {"value": place, "low": place_low, "high": place_high},
        }


def messages(question: Question, first: str, second: str) -> list[dict[str, Any]]:
    """What the judge is asked."""
    parts = ["[Question]", *_conversation(question)]
    if question.references:
        parts += ["[Reference answer]", question.references[0]]
    parts += ["[Answer 1]", THOUGHT.sub("", first, count=1), "[Answer 2]", THOUGHT.sub("", second, count=1)]
    parts += ["[End]", INSTRUCTION]
    return [{"role": "user", "content": "\n\n".join(parts)}]


def verdict(text: str) -> str | None:
    """``1``, ``2`` or ``tie``: the judge's last verdict; None where it has none."""
    found = VERDICT.findall(THOUGHT.sub("", text, count=1))
    return str(found[-1]).lower() if found else None


def compared(first: str, second: str, verdicts: Sequence[tuple[str | None, str | None] | None]) -> Comparison:
    """Count verdicts.

    Args:
        first, second: ids of the models.
        verdicts: of each question the verdict with the first model's answer shown first, and with the second's; None
            without an answer.
    """
    counts: Counter[str] = Counter()
    places: Counter[str] = Counter()
    for pair in verdicts:
        if pair is None:
            counts["unanswered"] += 1
            continue
        places.update(one for one in pair if one)
        counts[_outcome(*pair)] += 1
    return Comparison(
        first,
        second,
        wins=counts["win"],
        losses=counts["loss"],
        ties=counts["tie"] + counts["contradiction"],
        contradictions=counts["contradiction"],
        unclear=counts["unclear"],
        unanswered=counts["unanswered"],
        first_place=wilson(places["1"], places["1"] + places["2"]),
    )


def _outcome(forward: str | None, backward: str | None) -> str:
    if forward is None or backward is None:
        return "unclear"
    points = {"1": 1, "tie": 0, "2": -1}[forward] + {"1": -1, "tie": 0, "2": 1}[backward]
    if points == 0:
        return "tie" if forward == "tie" else "contradiction"
    return "win" if points > 0 else "loss"


def _conversation(question: Question) -> list[str]:
    if len(question.messages) == 1:
        return [question.prompt]
    return [f"{message['role']}: {message.get('content')}" for message in question.messages]
