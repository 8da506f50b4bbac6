"""Compares an answer with a reference. `RULES` states how, for the report."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Final

NUMBER: Final = re.compile(
    r"(?:(?<![\w)])[-+\u2212])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|(?<!\d)\.\d+)"
)
THOUGHT: Final = re.compile(r"\A.*?</think>", re.DOTALL)
AROUND: Final = " \t\n.,;:!?\"'`*_()[]{}<>\u201c\u201d\u2018\u2019\u00ab\u00bb"
TOLERANCE: Final = 1e-6
RULES: Final[Mapping[str, str]] = {
    "exact": "equal after normalisation: Unicode NFKC, lower case, runs of white space as one space, punctuation and "
    "quotes at both ends removed",
    "contains": "the reference is in the answer as whole words, both normalised as for exact",
    "regex": "Python's re.search finds the pattern in the answer",
    "numeric": "the last number of the answer equals the reference within the tolerance (relative, default 1e-6); "
    "commas between thousands are removed",
}


def is_right(answer: str, match: str, references: Sequence[str], tolerance: float = TOLERANCE) -> bool:
    """Whether an answer agrees with one of the references; text up to ``</think>`` does not count.

    Args:
        answer: of a model.
        match: a key of `RULES`.
        references: texts, patterns, or numbers as text.
        tolerance: of numbers, relative to the reference; absolute where it is 0.
    """
    answer = THOUGHT.sub("", answer, count=1)
    if match == "regex":
        return any(re.search(pattern, answer) for pattern in references)
    if match == "numeric":
        found = last_number(answer)
        return found is not None and any(_near(found, float(reference), tolerance) for reference in references)
    said = normalised(answer)
    if match == "exact":
        return any(said == normalised(reference) for reference in references)
    return any(_has_words(said, normalised(reference)) for reference in references)


def normalised(text: str) -> str:
    """Text for `exact` and `contains`; see `RULES`."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split()).strip(AROUND)


def last_number(text: str) -> float | None:
    """The last number of a text; None without one."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("\u2212", "-")) if found else None


def _near(value: float, reference: float, tolerance: float) -> bool:
    return math.isclose(value, reference, rel_tol=tolerance, abs_tol=tolerance if reference == 0 else 0.0)


def _has_words(text: str, part: str) -> bool:
    start = text.find(part)
    while start >= 0:
        end = start + len(part)
        before, after = text[start - 1 : start], text[end : end + 1]
        if not (before.isalnum() and part[:1].isalnum()) and not (after.isalnum() and part[-1:].isalnum()):
            return True
        start = text.find(part, start + 1)
    return False
