"""Reads the questions of ``quantserve evaluate``: JSON lines with a prompt and a reference answer."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quantserve.errors import UsageError, unknown_name
from quantserve_client.lines import messages_of, objects
from quantserve_client.scoring import RULES, TOLERANCE, normalised

BUILT_IN: Final = Path(__file__).parent / "data" / "questions.jsonl"
KEYS: Final = frozenset({"id", "prompt", "messages", "reference", "match", "tolerance", "category"})


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        id: from the file, else the number of the line.
        prompt: to show.
        messages: of the chat.
        references: right answers, as text; empty where a judge is needed.
        match: a key of `RULES`.
        tolerance: of numbers.
        category: for the report; "" without one.
    """

    id: str
    prompt: str
    messages: tuple[dict[str, Any], ...]
    references: tuple[str, ...]
    match: str
    tolerance: float = TOLERANCE
    category: str = ""


def read(name: str, match: str | None, judged: bool) -> list[Question]:
    """The questions of a file.

    Args:
        name: of the file; ``-`` for standard input.
        match: for questions that name none; None for exact, numeric where the reference is a number.
        judged: a judge compares the answers, so that references may be missing.

    Raises:
        UsageError: the file cannot be used; the message has file:line.
    """
    found: dict[str, Question] = {}
    for place, value in objects(name):
        question = _question(value, place, match, judged)
        if question.id in found:
            raise UsageError(
                f"{place}: the id {question.id!r} is there twice\n  fix: give each question an id of its own"
            )
        found[question.id] = question
    if not found:
        raise UsageError(f'{name} has no question\n  fix: write lines like {{"prompt": "2 + 2 = ?", "reference": 4}}')
    return list(found.values())


def fingerprint(questions: list[Question]) -> str:
    """A hash of the questions, for the report."""
    text = json.dumps([[q.id, q.messages, q.references, q.match, q.tolerance] for q in questions])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _question(value: dict[str, Any], place: str, match: str | None, judged: bool) -> Question:
    for key in value:
        if key not in KEYS:
            raise UsageError(f"{place}: {unknown_name('key', key, KEYS)}")
    prompt, messages = messages_of(value, place)
    given = value.get("reference")
    items = given if isinstance(given, list) else [] if given is None else [given]
    if not items and not judged:
        raise UsageError(
            f"{place}: no `reference`\n  fix: add the right answer, or compare the models by --judge MODEL"
        )
    references = []
    for item in items:
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise UsageError(f"{place}: `reference` is {json.dumps(item)[:60]}, a text, a number or a list is expected")
        references.append(str(item))
    numbers = bool(items) and all(isinstance(item, int | float) for item in items)
    how = value.get("match", match or ("numeric" if numbers else "exact"))
    if how not in RULES:
        raise UsageError(f"{place}: {unknown_name('match', str(how), RULES)}")
    _check(how, references, place)
    tolerance = value.get("tolerance", TOLERANCE)
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
        raise UsageError(f"{place}: `tolerance` is {json.dumps(tolerance)[:60]}, a number from 0 is expected")
    number = place.rpartition(":")[2]
    category = str(value.get("category", ""))
    return Question(
        str(value.get("id", number)), prompt, tuple(messages), tuple(references), how, float(tolerance), category
    )


def _check(match: str, references: list[str], place: str) -> None:
    for reference in references:
        if match == "regex":
            try:
                re.compile(reference)
            except (re.error, OverflowError, RecursionError) as error:
                raise UsageError(f"{place}: `reference` is no regular expression: {error}") from None
        elif match == "numeric":
            try:
                usable = math.isfinite(float(reference))
            except ValueError:
                usable = False
            if not usable:
                raise UsageError(f"{place}: `reference` is {reference[:60]!r}, a number is expected for match numeric")
        elif not normalised(reference):
            raise UsageError(f"{place}: `reference` has no letter and no digit\n  fix: use match regex")
